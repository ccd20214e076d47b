"""An enabled denoiser under torch.compile: equal to eager, and with as many graphs as the stock one."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

pytest.importorskip("diffusers")

import tiny_pipelines as tiny
from diffusers_support import assert_close

import entropy_attn

SIZES = [(8, 8), (16, 16), (16, 24), (24, 16), (32, 32), (40, 40), (48, 32), (20, 20), (28, 28), (36, 36)]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def one_layer():
    """A UNet with self-attention in its middle block alone."""
    return tiny.unet(32, "two levels", down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)


def run(unet, sizes=SIZES):
    text = torch.randn(2, 77, 32, generator=torch.Generator().manual_seed(0))
    samples = [torch.randn(2, 4, *size, generator=torch.Generator().manual_seed(1)) for size in sizes]
    with torch.no_grad():
        return [
            unet(sample, torch.tensor(900 - i), encoder_hidden_states=text, return_dict=False)[0]
            for i, sample in enumerate(samples)
        ]


def run_flux(transformer, sizes=(4, 8, 6)):
    outputs = []
    for i, size in enumerate(sizes):
        generator = torch.Generator().manual_seed(i)
        image = torch.randn(1, size * size, 16, generator=generator)
        text, pooled = torch.randn(1, 7, 32, generator=generator), torch.randn(1, 32, generator=generator)
        with torch.no_grad():
            outputs += transformer(
                hidden_states=image, encoder_hidden_states=text, pooled_projections=pooled, txt_ids=torch.zeros(7, 3),
                timestep=torch.tensor([0.5 - i / 8]), img_ids=torch.zeros(size * size, 3), return_dict=False,
            )  # fmt: skip
    return outputs


def compiled(unet, backend="eager", sizes=SIZES):
    """The outputs of the compiled model, and how many graphs they took."""
    counter = CompileCounterWithBackend(backend)
    outputs = run(torch.compile(unet, fullgraph=True, dynamic=True, backend=counter), sizes)
    return outputs, counter.frame_count


def assert_all_close(actual, expected):
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b)


def assert_none_close(actual, other):
    assert all((a - b).abs().max() > 1e-4 for a, b in zip(actual, other, strict=True))


def assert_same_record(rows, expected):
    """Each row the same but for rounding, entropies and all."""
    for row, wanted in zip(rows, expected, strict=True):
        assert row == wanted | {"entropy": pytest.approx(wanted["entropy"], abs=1e-5)}


@pytest.fixture(scope="module")
def stock_graphs():
    torch._dynamo.reset()
    return compiled(tiny.unet(32, "two levels"))[1]


def graphs_of(unet, sizes=SIZES):
    """The operators in the graphs of a compiled model."""
    found = set()

    def backend(graph, inputs):
        found.update(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph

    run(torch.compile(unet, fullgraph=True, dynamic=True, backend=backend), sizes)
    return found


def test_ten_sizes(stock_graphs):
    unet = tiny.unet(32, "two levels")
    stock = run(unet)
    with entropy_attn.enable(unet, strict=True) as handle:
        eager, eager_rows = run(unet), handle.layers()
        outputs, graphs = compiled(unet)
        assert handle.layers() == eager_rows
    assert graphs == stock_graphs
    assert_all_close(outputs, eager)
    assert torch.equal(outputs[SIZES.index((32, 32))], stock[SIZES.index((32, 32))])  # the trained size
    assert_none_close(outputs[2:4], stock[2:4])


def test_a_gain_takes_no_further_graph(stock_graphs):
    unet = tiny.unet(32, "two levels")
    with entropy_attn.enable(unet):
        without = run(unet)
    with entropy_attn.enable(unet, gain_exponent=1.0) as handle:
        expected = run(unet)
        outputs, graphs = compiled(unet)
    assert_all_close(outputs, expected)
    assert_none_close([expected[0], expected[-1]], [without[0], without[-1]])
    assert graphs == stock_graphs
    assert 1 < handle.layers()[0]["gain"] < 2


def test_graphs_hold_no_operator_of_ours():
    unet = one_layer()
    with entropy_attn.enable(unet, exponent=1.0, max_multiplier=1.1, overrides={"*mid*": {"exponent": 0.25}}):
        operators = [
            f for f in graphs_of(unet, SIZES[:1]) if isinstance(f, torch._ops.OpOverload | torch._ops.OpOverloadPacket)
        ]
    assert not [f for f in operators if "entropy_attn" in str(f) or torch.Tag.cudagraph_unsafe in f.tags]


def test_compiled_before_it_is_enabled():
    """Dynamo does not guard on hooks where there were none."""
    unet, other = one_layer(), one_layer()
    counter, others = CompileCounterWithBackend("eager"), CompileCounterWithBackend("eager")
    model = torch.compile(unet, fullgraph=True, dynamic=True, backend=counter)
    other_model = torch.compile(other, fullgraph=True, dynamic=True, backend=others)
    stock = run(model, SIZES[2:3])
    run(other_model, SIZES[2:3])
    for _ in range(2):
        with entropy_attn.enable(unet, strict=True):
            assert_all_close(run(model, SIZES[2:3]), run(unet, SIZES[2:3]))
            run(other_model, SIZES[2:3])
        assert_all_close(run(model, SIZES[2:3]), stock)
    assert others.frame_count == 1  # other compiled models keep their graph
    assert counter.frame_count == 2


def test_lora_loaded_before_the_first_call():
    peft = pytest.importorskip("peft")
    unet = one_layer()
    with entropy_attn.enable(unet, strict=True):
        torch.manual_seed(0)
        unet.add_adapter(peft.LoraConfig(target_modules=["to_q"], init_lora_weights=False))
        outputs, _ = compiled(unet, sizes=SIZES[2:3])
        assert_all_close(outputs, run(unet, SIZES[2:3]))


@pytest.mark.parametrize(
    "options",
    [
        {"record_entropy": True},
        pytest.param({"steps": (1, 3)}, marks=pytest.mark.slow),
        pytest.param({"record_entropy": True, "attention": "model"}, marks=pytest.mark.slow),
    ],
)
def test_steps_and_records_cut_the_graph(options):
    unet, recorded = one_layer(), None
    with entropy_attn.enable(unet, strict=True, **options) as handle:
        eager = run(unet, SIZES[2:3])
        if handle.entropy:
            recorded = handle.entropy.table(by=("layer", "step", "half", "head"))
    with entropy_attn.enable(unet, strict=True, **options) as handle:
        outputs = run(torch.compile(unet, dynamic=True, backend="eager"), SIZES[2:3])
        if recorded:
            assert_same_record(handle.entropy.table(by=("layer", "step", "half", "head")), recorded)
        assert_all_close(outputs, eager)
        torch._dynamo.reset()
        with pytest.raises(torch._dynamo.exc.Unsupported, match="disable"):
            compiled(unet, sizes=SIZES[:1])


@pytest.mark.slow
def test_our_attention_in_the_graph():
    unet = one_layer()
    with entropy_attn.enable(unet, attention="fused", strict=True):
        eager = run(unet, SIZES[2:4])
        outputs, graphs = compiled(unet, sizes=SIZES[2:4])
        assert torch.ops.entropy_attn.attention in graphs_of(unet, SIZES[:1])
    assert_all_close(outputs, eager)
    assert graphs == 1


def test_settings_can_change_without_recompiling():
    unet = one_layer()
    counter = CompileCounterWithBackend("eager")
    model = torch.compile(unet, fullgraph=True, dynamic=True, backend=counter)
    for exponent in (0.5, 1.0, 2.0):
        with entropy_attn.enable(unet, exponent=exponent):
            assert_all_close(run(model, [(16, 24)]), run(unet, [(16, 24)]))
    guards_on_floats = torch.__version__.startswith("2.8.")  # on the values of those that it makes variables, too
    assert counter.frame_count == (3 if guards_on_floats else 1)


def test_compiled_in_place():
    unet = one_layer()
    with entropy_attn.enable(unet, strict=True):
        eager = run(unet, SIZES[2:4])
        unet.compile(fullgraph=True, dynamic=True, backend="eager")
        assert_all_close(run(unet, SIZES[2:4]), eager)


def test_compiled_within_a_larger_function():
    unet = one_layer()

    def guided(sample, timestep, encoder_hidden_states, return_dict):
        return (2 * unet(sample, timestep, encoder_hidden_states, return_dict=return_dict)[0],)

    with entropy_attn.enable(unet, strict=True) as handle:
        eager = run(unet, SIZES[2:4])
        outputs = run(torch.compile(guided, fullgraph=True, dynamic=True, backend="eager"), SIZES[2:4])
        assert_all_close(outputs, [2 * x for x in eager])
        assert {row["tokens"] for row in handle.layers()} == {96}


def test_repeated_blocks_share_their_graphs():
    def graphs(transformer):
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("eager")
        transformer.compile_repeated_blocks(fullgraph=True, dynamic=True, backend=counter)
        return run_flux(transformer), counter.frame_count

    _, stock_graphs = graphs(tiny.flux_transformer(3, 10))
    transformer = tiny.flux_transformer(3, 10)
    stock = run_flux(transformer)
    entropy_attn.enable(transformer)
    eager = run_flux(transformer)
    outputs, enabled_graphs = graphs(transformer)
    entropy_attn.disable(transformer)
    assert enabled_graphs == stock_graphs
    assert_all_close(outputs, eager)
    assert_none_close(outputs, stock)


def test_gradients_are_not_cut_off():
    transformer = tiny.flux_transformer()
    image = torch.randn(1, 36, 16, requires_grad=True)

    def loss(model):
        output = model(
            hidden_states=image, encoder_hidden_states=torch.ones(1, 7, 32), pooled_projections=torch.ones(1, 32),
            timestep=torch.tensor([0.5]), img_ids=torch.zeros(36, 3), txt_ids=torch.zeros(7, 3), return_dict=False,
        )[0]  # fmt: skip
        return torch.autograd.grad(output.square().sum(), image)[0]

    with entropy_attn.enable(transformer):
        eager = loss(transformer)
        torch.testing.assert_close(loss(torch.compile(transformer, fullgraph=True, backend="aot_eager")), eager)


@pytest.mark.slow
def test_another_processor():
    unet = one_layer()
    unet.set_default_attn_processor()
    with entropy_attn.enable(unet, strict=True):
        outputs, _ = compiled(unet, sizes=SIZES[2:3])
        assert_all_close(outputs, run(unet, SIZES[2:3]))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_backends(backend):
    unet = tiny.unet(32, "two levels")
    with entropy_attn.enable(unet, strict=True):
        eager = run(unet, SIZES[:4])
        outputs, _ = compiled(unet, backend, SIZES[:4])
    for a, b in zip(outputs, eager, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
