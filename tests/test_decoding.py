"""Steps that become CUDA graphs, replayed on a CPU (recorded_graphs.py): the texts are those without a graph."""

import gc
import itertools

import pytest
import torch
from recorded_graphs import RecordedGraph
from small_models import shaken, small

from nanogpt import decoding
from nanogpt.decoding import GraphStep, Step, make_step, on_host


@pytest.fixture
def graphs(monkeypatch):
    """The graphs that are recorded, weakly held: GraphStep alone keeps them. Spans are 4, 8 and 12 positions."""
    recorded = []

    def capture(function, device, pool):
        graph = RecordedGraph(function, pool)
        recorded.append(graph)
        return graph, graph.outputs

    monkeypatch.setattr(decoding, "capture", capture)
    monkeypatch.setattr(decoding, "SHORTEST_SPAN", 4)
    return recorded


def generators(rows, seed=7):
    return [torch.Generator().manual_seed(seed + k) for k in range(rows)]


def text(model, step, prompt=3, new=60, rows=1, seed=7, **options):
    """Token ids of `rows` texts (rows, new), which continue as many prompts of `prompt` tokens."""
    torch.manual_seed(seed)
    idx = torch.randint(23, (rows, prompt))
    return torch.cat(list(model.stream(idx, new, step=step, generators=generators(rows, seed), **options)), dim=1)


KNOWN = torch.arange(23) % 5 != 0


HOW = [
    dict(temperature=0), dict(), dict(temperature=0.8, top_k=5), dict(top_p=0.7, allowed=KNOWN),
    dict(temperature=0, allowed=KNOWN),
]  # fmt: skip
PROMPTS, WINDOW_STEPS = [(1, 1), (3, 2), (12, 1), (30, 3)], [1, 2, 5, 100]
QUICK = [(how, PROMPTS[(i + j) % 4], step) for i, how in enumerate(HOW) for j, step in enumerate(WINDOW_STEPS)]
ALL = itertools.product(HOW, PROMPTS, WINDOW_STEPS)


@pytest.mark.parametrize("how, prompt, rows, window_step", [  # the quick ones have each two of the three together
    pytest.param(how, *prompt, step, marks=[] if (how, prompt, step) in QUICK else pytest.mark.slow)
    for how, prompt, step in ALL
], ids=lambda value: " ".join(value) or "plain" if isinstance(value, dict) else str(value))  # fmt: skip
def test_texts_of_graphs_are_those_without(graphs, how, prompt, rows, window_step):
    model = shaken(small(), 0.2)
    settings = dict(prompt=prompt, rows=rows, window_step=window_step)
    expected = text(model, Step(model, rows, **how), **settings)
    step = GraphStep(model, rows, **how)
    assert torch.equal(text(model, step, **settings), expected)
    assert len(set(expected.flatten().tolist())) > 2 and step.works
    assert sum(graph.replays for graph in graphs) > 20  # and graphs made them


def test_a_large_vocabulary_and_the_global_generator(graphs):
    model = shaken(small(vocab_size=50304), 0.2)
    for how in (dict(temperature=0), dict(top_k=200, temperature=0.8)):
        found = []
        for step in (Step(model, 2, **how), GraphStep(model, 2, **how)):
            torch.manual_seed(3)
            found.append(torch.cat(list(model.stream(torch.zeros(2, 1, dtype=torch.int64), 30, step=step)), dim=1))
        assert torch.equal(*found) and graphs


@pytest.mark.parametrize("bfloat16", [False, True])
def test_a_graph_reads_nothing_that_autocast_may_free(graphs, bfloat16):
    """It reads the model's weights and what the step holds, no cast copy of a weight; so it outlives the context."""
    model = shaken(small(), 0.2)
    step, other = GraphStep(model, 1, temperature=0), GraphStep(model, 1, temperature=0)
    found = []
    for each in (step, step, other):
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            found.append(text(model, each))
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    held = [*model.parameters(), *itertools.chain(*step.layers), step.position, step.places]
    held = {tensor.untyped_storage().data_ptr() for tensor in held}
    for graph, given, _ in step.graphs.values():
        assert graph.reads and graph.reads <= held | {given.untyped_storage().data_ptr()}
    assert len(step.graphs) == 4  # three spans and the full window


def test_graphs_share_a_pool_and_nothing_is_read_after_it_is_gone(graphs):
    model = shaken(small(), 0.2)
    expected = text(model, Step(model, 1))
    step = GraphStep(model, 1)
    found = text(model, step)
    assert len({id(graph.pool()) for graph in graphs}) == 1 and len(graphs) == 3  # two spans and the window
    memory = graphs[0].memory
    graphs.clear()
    del step
    gc.collect()
    assert bytes(memory[0])[:4] == b"\xff" * 4  # gone
    assert torch.equal(found, expected)


def test_two_prompts_in_turn_give_what_each_gives_alone(graphs):
    model = shaken(small(), 0.2)
    prompts = [dict(prompt=3, seed=1), dict(prompt=5, seed=2, new=20), dict(prompt=12, seed=3), dict(prompt=3, seed=1)]
    alone = [text(model, Step(model, 1, temperature=0.9), **prompt) for prompt in prompts]
    step = GraphStep(model, 1, temperature=0.9)
    recorded = []
    for prompt, expected in zip(prompts, alone, strict=True):
        assert torch.equal(text(model, step, **prompt), expected)
        recorded.append(len(graphs))
    assert recorded == [3, 3, 3, 4]  # the later ones use the first one's graphs; a shape needs two tokens


def test_a_text_that_is_given_up_leaves_the_next_one_alone(graphs):
    model = shaken(small(), 0.2)
    expected = text(model, Step(model, 1))
    step = GraphStep(model, 1)
    for tokens in (1, 7, 25):
        stream = model.stream(torch.ones(1, 4, dtype=torch.int64), 50, step=step, generators=generators(1, 3))
        list(itertools.islice(stream, tokens))
        assert torch.equal(text(model, step), expected)


def test_streams_under_way_at_once_do_not_share_a_step(graphs, monkeypatch):
    model = shaken(small(), 0.2)
    monkeypatch.setattr(decoding, "make_step", GraphStep)  # as on CUDA
    prompts = [torch.ones(1, 3, dtype=torch.int64), torch.full((1, 5), 7)]
    alone = [list(model.stream(prompt, 40, generators=generators(1))) for prompt in prompts]
    at_once = list(zip(*(model.stream(prompt, 40, generators=generators(1)) for prompt in prompts), strict=True))
    assert [list(tokens) for tokens in zip(*at_once, strict=True)] == alone


# ----------------------------------------------------------------------------------------------
# graphs that do not work


def test_a_capture_that_fails_is_a_line_and_the_text_is_the_same(monkeypatch, capsys):
    model, tried = shaken(small(), 0.2), []
    expected = text(model, Step(model, 2), rows=2)

    def capture(function, device, pool):
        tried.append(function())  # and it fails at the end
        raise RuntimeError("CUDA error: operation not permitted\nmore")

    monkeypatch.setattr(decoding, "capture", capture)
    assert torch.equal(text(model, GraphStep(model, 2), rows=2), expected)
    assert len(tried) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == (
        "a CUDA graph does not work here (CUDA error: operation not permitted): sampling continues "
        "without, slower\n"
    )


@pytest.mark.parametrize("fault", ["no operations", "wrong logits"])
def test_a_graph_with_other_logits_is_a_line_and_the_text_is_the_same(graphs, monkeypatch, capsys, fault):
    model = shaken(small(), 0.2)
    expected = text(model, Step(model, 2), rows=2)

    class Wrong(RecordedGraph):
        def replay(self):
            super().replay()
            self.outputs[0].add_(torch.randn_like(self.outputs[0]))
            for keys, values in step.layers:  # and its keys and values are as wrong
                keys[:, :, step.length], values[:, :, step.length] = 5.0, 5.0

    def capture(function, device, pool):
        if fault == "no operations":  # they have run at once, on another device's stream
            return RecordedGraph(lambda: None, pool), function()
        graph = Wrong(function, pool)
        return graph, graph.outputs

    monkeypatch.setattr(decoding, "capture", capture)
    step = GraphStep(model, 2)
    assert torch.equal(text(model, step, rows=2), expected) and not step.graphs
    assert capsys.readouterr().err.splitlines() == [
        "a CUDA graph does not work here (its logits are other ones): sampling continues without, slower"
    ]


def test_the_check_of_a_graph_disturbs_neither_draws_nor_cache(graphs):
    """The token of the step in which a graph is recorded, those after it and the generator are as without."""
    model = shaken(small(), 0.2)
    states = []
    for kind in (Step, GraphStep):
        own = generators(1)
        step = kind(model, 1)
        tokens = model.stream(torch.ones(1, 2, dtype=torch.int64), 8, step=step, generators=own)
        found = []
        for token in tokens:
            found.append((token.item(), own[0].get_state().tolist()))
        length = step.length - 1
        states.append((found, [t[:, :, :length].clone() for layer in step.layers for t in layer]))
    assert states[0][0] == states[1][0] and len(graphs) == 2
    for a, b in zip(states[0][1], states[1][1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_logits_that_are_not_numbers_are_an_error_as_without(graphs):
    model = small()
    model.transformer.wte.weight.data[:] = float("nan")
    for kind in (Step, GraphStep):
        with pytest.raises(RuntimeError):
            text(model, kind(model, 1))
    assert not graphs


# ----------------------------------------------------------------------------------------------
# who samples with graphs




def test_a_plain_model_on_cuda_takes_graphs_and_others_do_not(monkeypatch):
    made = []
    for kind in ("GraphStep", "Step"):
        monkeypatch.setattr(decoding, kind, lambda *_, kind=kind, **__: made.append(kind))

    class Model:
        pass

    def model(is_cuda=True, **more):
        found = Model()
        found.transformer = Model()
        found.transformer.wte = Model()
        found.transformer.wte.weight = Model()
        found.transformer.wte.weight.is_cuda = is_cuda
        vars(found).update(more)
        return found

    for each in (model(), model(False), model(forward=print), model(unshard=print)):
        make_step(each, 1)
    before = torch.backends.cuda.math_sdp_enabled()
    torch.backends.cuda.enable_math_sdp(False)
    make_step(model(), 1)  # --attention=flash
    torch.backends.cuda.enable_math_sdp(before)
    assert made == ["GraphStep", "Step", "Step", "Step", "Step"]


def test_on_a_cpu_a_token_is_read_before_the_next_is_computed():
    computed = []

    def tokens():
        for k in range(3):
            computed.append(k)
            yield torch.tensor([[k], [k + 10]])

    ids = on_host(tokens())
    assert next(ids) == [0, 10] and computed == [0]
    assert list(ids) == [[1, 11], [2, 12]]


def test_on_cuda_one_token_is_computed_while_the_host_reads_and_no_more(monkeypatch):
    events, computed = [], []

    class Event:
        def record(self):
            events.append("recorded")

        def synchronize(self):
            events.append("waited")

    class Token:
        is_cuda = True

        def __init__(self, k):
            self.k = k
            computed.append(k)

        def flatten(self):
            return self

        def to(self, device, non_blocking):
            assert (device, non_blocking) == ("cpu", True)
            return torch.tensor([self.k])

    monkeypatch.setattr(torch.cuda, "Event", Event)
    ids = on_host(map(Token, range(4)))
    assert next(ids) == [0] and computed == [0, 1] and events == ["recorded", "recorded", "waited"]
    assert list(ids) == [[1], [2], [3]] and events.count("waited") == 4
    assert list(on_host(map(Token, ()))) == []
