"""The tree against a dict of prefixes, and the order in which it gives pages up."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from tilewright.runtime.prefix_tree import PrefixTree

TOKENS = st.lists(st.integers(0, 1), max_size=9)
SPACE = st.sampled_from(["", "other"])
HOST = 10_000


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class TreeMachine(RuleBasedStateMachine):
    """`model` maps a namespace and the tokens of whole pages to the page that ends them; `memory`
    is what pages of the device and of the host would hold. Those of the host are from 10,000 on.
    """

    @initialize(page_size=st.integers(1, 3), host=st.sampled_from([0, 0, 1, 3, 8]))
    def start(self, page_size, host):
        self.size, self.clock, self.num_host = page_size, Clock(), host
        self.tree = PrefixTree(page_size, self.clock, range(HOST, HOST + host))
        self.model, self.memory = {}, {}
        self.held, self.pinned, self.next_page = set(), {}, 1

    def known(self, space, tokens):
        """The model's pages of the longest cached prefix."""
        pages = []
        for stop in range(self.size, len(tokens) + 1, self.size):
            page = self.model.get((space, tuple(tokens[:stop])))
            if page is None:
                break
            pages.append(page)
        return pages

    @rule(space=SPACE, tokens=TOKENS)
    def insert(self, space, tokens):
        count = len(tokens) // self.size
        known = [page for page in self.known(space, tokens) if page < HOST]
        pages = known + [self.next_page + i for i in range(count - len(known))]
        self.next_page += count
        assert self.tree.insert(space, tokens[: count * self.size], pages) == pages[len(known) :]
        for index, page in enumerate(pages):
            key = space, tuple(tokens[: (index + 1) * self.size])
            self.model[key], self.memory[page] = page, key

    @rule(space=SPACE, tokens=TOKENS, takes=st.booleans())
    def look(self, space, tokens, takes):
        found = (self.tree.match if takes else self.tree.peek)(space, tokens)
        pages = self.known(space, tokens)
        assert found.pages == [page for page in pages if page < HOST]
        assert found.pages + found.host == pages
        done = len(pages) * self.size
        rest = tokens[done : done + self.size]
        best = {}
        for (other, key), page in self.model.items():
            if other == space and len(key) == done + self.size and key[:done] == (*tokens[:done],):
                best[page] = len(
                    [1 for i in range(len(rest)) if key[done:][: i + 1] == (*rest[: i + 1],)]
                )
        equal = max(best.values(), default=0)
        if found.partial is None:
            assert equal == 0
        else:
            assert 0 < found.partial[1] == equal == best[found.partial[0]]
        if takes:
            self.held.update(found.pages)

    @rule(space=SPACE, tokens=TOKENS, seconds=st.integers(0, 5))
    def pin(self, space, tokens, seconds):
        self.tree.pin(space, tokens, seconds)
        for stop in range(self.size, len(self.known(space, tokens)) * self.size + 1, self.size):
            key = space, tuple(tokens[:stop])
            self.pinned[key] = max(self.pinned.get(key, 0), self.clock.now + seconds)

    @rule(seconds=st.integers(1, 3))
    def wait(self, seconds):
        self.clock.now += seconds

    @rule()
    def let_go(self):
        self.held.clear()

    @precondition(lambda self: self.model)
    @rule(count=st.integers(0, 6))
    def evict(self, count):
        device = {page: key for key, page in self.model.items() if page < HOST}
        idle = set(device) - self.held
        found = self.tree.evict(count, lambda page: page not in self.held)
        gone = [*found.pages, *found.pinned]
        assert len(gone) == len(set(gone)) == min(count, len(idle))
        assert set(gone) <= idle
        still = {page for page in idle if self.pinned.get(device[page], 0) > self.clock.now}
        assert not still & set(found.pages) and set(found.pinned) <= still
        if found.pinned:  # then nothing else was left
            assert idle - set(gone) <= still
        self._move(found.copies, gone, device)

    def _move(self, copies, gone, device):
        assert [page for page, _ in copies] == (gone if self.num_host else [])
        for page, host in copies:
            assert HOST <= host < HOST + self.num_host
            self.memory[host] = self.memory[page]
        for page in gone:
            del self.model[device[page]], self.memory[page]
        # The host keeps those that came last, but for what the pins say.
        on_host = {key: page for key, page in self.model.items() if page >= HOST}
        kept = {key: page for page, key in self.memory.items() if page >= HOST}
        assert self.tree.num_host == min(self.num_host, len(on_host) + len(copies))
        self.model.update(kept)
        self.model = {
            key: page for key, page in self.model.items() if page < HOST or self.memory[page] == key
        }
        for key in [key for key, page in self.model.items() if page >= HOST]:
            space, tokens = key
            assert len(self.known(space, tokens)) == len(tokens) // self.size

    @rule()
    def clear(self):
        assert sorted(self.tree.clear()) == sorted(p for p in self.model.values() if p < HOST)
        self.model.clear()
        self.memory.clear()
        self.held.clear()

    @invariant()
    def it_holds_what_the_model_holds(self):
        device = [page for page in self.model.values() if page < HOST]
        assert self.tree.num_pages == len(device)
        assert self.tree.num_host == len(self.model) - len(device)
        assert {name for name, _ in self.model} == set(self.tree._roots)
        for (space, tokens), page in self.model.items():
            found = self.tree.peek(space, tokens)
            assert (found.pages + found.host)[-1] == page
            assert self.memory[page] == (space, tokens)


TestPrefixTree = TreeMachine.TestCase
TestPrefixTree.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)


def gone(tree, count, held=()):
    found = tree.evict(count, lambda page: page not in held)
    return found.pages + found.pinned


@pytest.mark.quick
def test_edges_are_split_where_pages_meet():
    tree = PrefixTree(2)
    assert tree.insert("", [1, 2, 3, 4, 5, 6], [10, 11, 12]) == [10, 11, 12]
    assert tree.insert("", [1, 2, 3, 4, 5, 7], [10, 11, 13]) == [13]
    assert tree.insert("", [1, 2, 3, 9], [10, 14]) == [14]
    assert tree.peek("", [1, 2, 3, 4, 5, 7]).pages == [10, 11, 13]
    assert tree.peek("", [1, 2, 3, 9, 9]).pages == [10, 14]
    assert tree.peek("", [1, 2, 3]).partial in [(11, 1), (14, 1)]
    assert tree.peek("else", [1, 2, 3, 4]).pages == []


def test_the_least_recently_used_end_goes_first():
    tree = PrefixTree(1)
    tree.insert("", [1, 2, 3], [10, 11, 12])
    tree.insert("", [1, 5], [10, 13])
    tree.insert("", [7], [14])
    assert tree.match("", [1, 2]).pages == [10, 11]  # but not 3
    assert gone(tree, 1) == [12]
    assert gone(tree, 1) == [13]
    assert gone(tree, 9) == [14, 11, 10]
    assert tree.num_pages == 0 and not tree._roots


def test_pages_that_are_held_stay():
    tree = PrefixTree(1)
    tree.insert("", [1, 2, 3], [10, 11, 12])
    assert gone(tree, 9, held={10, 11}) == [12]
    assert tree.peek("", [1, 2, 3]).pages == [10, 11]


def both(tree):
    found = tree.evict(1, lambda page: True)
    return found.pages, found.pinned


def test_a_pin_holds_until_its_time_or_until_nothing_else_is_left():
    clock = Clock()
    tree = PrefixTree(1, clock)
    tree.insert("", [1, 2, 3], [10, 11, 12])
    tree.insert("", [4], [13])
    tree.pin("", [1, 2], 5)
    tree.match("", [4])
    assert both(tree) == ([12], [])  # behind the pin
    assert both(tree) == ([13], [])
    assert both(tree) == ([], [11])
    clock.now = 5.0
    assert both(tree) == ([10], [])


def test_more_go_at_once_but_not_pinned_ones_and_not_to_the_host():
    for host in ([], [100]):
        tree = PrefixTree(1, Clock(), host=host)
        tree.insert("", [1, 2], [10, 11])
        tree.insert("", [3, 4, 5], [12, 13, 14])
        tree.pin("", [1, 2], 5)
        found = tree.evict(1, lambda page: page != 12, 9)
        assert (found.pages, found.pinned) == ([14] if host else [14, 13], [])
        assert found.copies == [(14, 100)] * len(host)
        if not host:
            found = tree.evict(1, lambda page: page != 12, 9)
            assert (found.pages, found.pinned) == ([], [11])


def test_the_host_takes_what_the_device_gives_up_and_gives_it_back():
    tree = PrefixTree(1, host=[100, 101])
    tree.insert("", [1, 2, 3], [10, 11, 12])
    assert tree.evict(2, lambda page: True).copies == [(12, 101), (11, 100)]
    found = tree.match("", [1, 2, 3])
    assert (found.pages, found.host) == ([10], [100, 101])
    assert tree.insert("", [1, 2], [10, 21]) == [21]  # one came back
    assert tree.peek("", [1, 2, 3]).host == [101] and tree.num_host == 1
    tree.insert("", [1, 5], [10, 13])
    assert tree.evict(9, lambda page: page != 10).copies == [(21, 100), (13, 101)]
    assert tree.peek("", [1, 2, 3]).host == [100]  # the end that was not used for longest went
