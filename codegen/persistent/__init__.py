"""One launch for all layers: a persistent kernel generated from the decode graph of a dense model.

At batch 1 a step is a read of all weights; what keeps it from the memory's rate are the gaps
between launches, when nothing is on its way. Here each multiprocessor has one program that stays,
and meets all calls of the graph in order (reading.py), each by its form (generate.py, kernel.py).

**Tiles.** A product is cut by rows of its weight: a tile is two groups of R rows, read in chunks
[R, 256 columns a warp], one of either group in turn. Attention is cut by KV heads and splits of the
keys; whoever comes last of a head merges. Tiles are handed out in turn over all programs, the first
of a call behind the last of the call before (table.py), by a table on the device: so each program
has one stream of chunks, whose addresses are known before the step begins.

**Weights do not wait.** Two chunks of the stream are in registers or on their way there, and
``ahead`` more on their way to L2, whichever call they belong to: while a program waits for its
input, the memory goes on. A chunk's place is filled again when it has been multiplied.

**Memory protocol.** Each call has a counter. Who has written its tiles passes a barrier of its
threads, then adds 1 with release; who needs the call's result polls with acquire until as many have
arrived as have tiles, then loads. A call waits for the one before it alone, and that one's writers
had waited for theirs: so no memory is written while an earlier call may read it. Counters only
grow: their targets are multiples of the number of the launch, which the last program to end counts
up, and wrap with them. Nothing is zeroed between launches, and a captured graph replays.

**Watchdog.** All programs are resident (cooperative launch), so no wait is for one that cannot run.
Should one be in vain all the same, it ends after a number of polls: the first to give up notes
call, program, target and count, nobody of that program waits any more, all arrive where they
should, and the launch ends in about a second, with NaN among the logits, which no token is chosen
of, and what was noted in `PersistentDecode.check`.

**Without a GPU** the text runs in Triton's interpreter as one program: it meets the calls in order,
so that each wait is over at once, and there are neither prefetches nor times.

**In an engine** it is the first of two ways that a decode Program has (lowering.py): a step of one
sequence is this launch with the sampling behind it, a step of more the calls of the graph; or each
of 1, 2, 4 and 8 sequences has a launch, whose chunks of weights meet every sequence's x. It is made
where `compile(decode="persistent")`, or `"persistent:8"`, says so, and by default for those numbers
of sequences of which a tuning record says that it is faster (compiler/decode_choice.py); without a
record steps are separate kernels. The call holds its graph; loading makes the text anew of that,
and refuses another one (loading.py).

**A ring of weights** serves steps of one sequence on sm_90 where sizes fit (ring.py): tiles of
whole rows come by TMA into shared memory, programs wait for the values themselves, not for
counters (ring_kernel.py), and tensor cores multiply (ring_mma_kernel.py). It is right and quick
where what is above is right everywhere: of codes it takes e4m3 by rows, x rounded to it too, and 4
bits by groups of 128 columns or a multiple. Without a GPU its tables, its PTX, that it compiles and
a model of its memory are tested, since Gluon has no interpreter. `lowering.cut_for` chooses between
both.

**Codes.** Weights may be e4m3 by rows or blocks, or 4 bits by groups (codes.py); then chunks hold
words of 32 bits, and scales of groups come with them (cut.py, codes_kernel.py). Where the graph
rounds x to e4m3, each program rounds its own copy, to the codes that a launch for all would make.
Codes of 4 bits meet x as it is, also where the graph would let x be rounded to int8.

**Times.** A kernel made with ``timed`` notes when each program met, began and ended each call, and
on which multiprocessor (trace.py); `tilewright inspect --html --trace` draws that.

Sums are in float32 and rounded where the separate kernels round, in another order.
"""
