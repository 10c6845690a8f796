"""Requests made up from the server's own OpenAPI schema: none of them is the server's fault."""

from __future__ import annotations

import httpx
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.nightly

_EACH = 40  # requests of an operation and a kind


@pytest.mark.parametrize("valid", [True, False])
def test_no_request_is_the_servers_fault(served, valid) -> None:
    schemathesis = pytest.importorskip("schemathesis", reason="pip install schemathesis")
    text = httpx.get(f"{served.url}/openapi.json").json()
    mode = schemathesis.GenerationMode.POSITIVE if valid else schemathesis.GenerationMode.NEGATIVE
    tried = 0
    for found in schemathesis.openapi.from_dict(text).get_all_operations():
        operation = found.ok()
        cases = operation.as_strategy(generation_mode=mode)
        if not operation.body and not (valid and operation.path_parameters):
            continue  # nothing to make up: any text is a name
        tried += 1
        _try(cases, served.url)
    assert tried >= 4


def _try(cases: st.SearchStrategy, url: str) -> None:
    @settings(
        max_examples=_EACH,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases)
    def go(case) -> None:
        if isinstance(case.body, dict):  # its answers may be as long as the context
            case.body = {
                **case.body,
                **({"max_tokens": 2} if "max_tokens" not in case.body else {}),
            }
        answer = case.call(base_url=url, timeout=60)
        assert answer.status_code < 500 or answer.status_code == 501, (
            case.as_curl_command(),
            answer.text[:300],
        )

    go()
