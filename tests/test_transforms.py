"""Never less than torch: what torch's modules can do beside a plain call, ours can too."""

import copy
import itertools
import warnings

import pytest
import torch
from models import CELLS, MODULES, SEQUENCES, assert_close, flat, gradients, make, pair, random_hx
from observers import Functions, Marked, Ops
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

import fastseq

pytestmark = pytest.mark.usefixtures("route")
each = pytest.mark.parametrize(("ours", "torchs"), SEQUENCES)
every = pytest.mark.parametrize(("ours", "torchs"), [*SEQUENCES, *CELLS])


def sample(module):
    shape = (5, 3) if isinstance(module, torch.nn.RNNCellBase) else (6, 5, 3)
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


@every
def test_create_graph(ours, torchs):
    module, reference = pair(ours, torchs, 3, 4)
    x = sample(module)
    results = []
    for m in (module, reference):
        first = torch.autograd.grad(sum(o.sin().sum() for o in flat(m(x))), [x, *m.parameters()], create_graph=True)
        results.append([*first, *gradients([g.sin() for g in first], [x, *m.parameters()])])
    assert_close(*results)


def test_create_graph_where_inputs_depend_on_each_other():
    """An input computed from a weight: its gradient must not be counted twice."""
    rnn, reference = pair(fastseq.GRU, torch.nn.GRU, 3, 4)
    results = []
    for m in (rnn, reference):
        x = (m.weight_ih_l0[:, None] * torch.arange(5, dtype=torch.float64)[:, None]).tanh()
        (g,) = torch.autograd.grad(m(x)[0].sin().sum(), m.weight_ih_l0, create_graph=True)
        results.append([g, *torch.autograd.grad(g.sin().sum(), list(m.parameters()))])
    assert_close(*results)


@pytest.mark.parametrize("cell", MODULES)
def test_create_graph_beyond_torch(cell):
    rnn = make(cell, 3, 4, bidirectional=True)
    reset = torch.rand(6, 5) < 0.3

    def run(x, *hx):
        hx = hx if cell == "lstm" else hx[0]
        return tuple(flat(rnn(x, hx, lengths=[6, 2, 0, 4, 1], reset=reset, return_states=True)))

    inputs = (torch.randn(6, 5, 3, dtype=torch.float64, requires_grad=True), *flat([random_hx(rnn, 5, True)]))
    assert torch.autograd.gradcheck(run, inputs, fast_mode=True)
    assert torch.autograd.gradgradcheck(run, inputs, fast_mode=True)


@every
def test_batched_gradients(ours, torchs):
    """`is_grads_batched`, as vectorized Jacobians use it: the backward runs inside vmap, the forward did not."""
    module = pair(ours, torchs, 3, 4)[0]
    x = sample(module)
    outputs = flat(module(x))
    inputs = [x, *module.parameters()]
    grads = [torch.randn(7, *o.shape, dtype=o.dtype) for o in outputs]
    options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True}
    each_alone = [torch.autograd.grad(outputs, inputs, g, **options) for g in zip(*grads, strict=True)]
    for create_graph in (False, True):
        batched = torch.autograd.grad(
            outputs, inputs, grads, is_grads_batched=True, create_graph=create_graph, **options
        )
        assert_close(list(batched), [torch.stack(g) for g in zip(*each_alone, strict=True)])
    assert_close(list(torch.autograd.grad(outputs, inputs, [g[0] for g in grads], **options)), list(each_alone[0]))


@every
def test_gradients_that_are_no_plain_tensors(ours, torchs):
    module = pair(ours, torchs, 3, 4)[0]
    x = sample(module)
    inputs = [x, *module.parameters()]
    outputs = flat(module(x))
    grads = [torch.randn_like(o) for o in outputs]
    wanted = torch.autograd.grad(outputs, inputs, grads, retain_graph=True)
    for changed in (lambda g: g.as_subclass(Marked), lambda g: torch._neg_view(-g)):
        found = torch.autograd.grad(outputs, inputs, list(map(changed, grads)), retain_graph=True)
        assert_close([g.as_subclass(torch.Tensor) for g in found], list(wanted))


@every
def test_jvp(ours, torchs):
    module, reference = pair(ours, torchs, 3, 4)
    x = sample(module).detach()
    tangent = torch.randn_like(x)
    results = [jvp(lambda t, m=m: tuple(flat(m(t))), (x,), (tangent,)) for m in (module, reference)]
    assert_close(*map(flat, results))
    with forward_ad.dual_level():
        outputs = flat(module(forward_ad.make_dual(x, tangent)))
        assert_close([forward_ad.unpack_dual(o).tangent for o in outputs], list(results[1][1]))


@each
def test_packed_sequences_in_transforms(ours, torchs):
    module = pair(ours, torchs, 3, 4, 2, bidirectional=True)[0]
    packed = torch.nn.utils.rnn.pack_padded_sequence(sample(module).detach(), [3, 6, 1, 2, 6], enforce_sorted=False)

    def run(data):
        y, hx = module(packed._replace(data=data))
        return y.data.sin().sum() + sum(s.cos().sum() for s in flat([hx]))

    data = packed.data.clone().requires_grad_()
    (wanted,) = torch.autograd.grad(run(data), data)
    assert_close(grad(run)(packed.data), wanted)
    tangent = torch.randn_like(wanted)
    assert_close(jvp(run, (packed.data,), (tangent,))[1], (wanted * tangent).sum())
    assert_close(vmap(run)(packed.data[None])[0], run(packed.data).detach())


def test_jvp_beyond_torch():
    """Forward-mode derivatives of what torch has not, and of torch's float32 LSTM, which has none."""
    for lstm, options in ((make("lstm", 3, 4), {"lengths": [2, 6, 0]}), (fastseq.LSTM(3, 4), {})):
        dtype = lstm.weight_ih_l0.dtype
        x, tangent = torch.randn(2, 6, 3, 3, dtype=dtype)
        _, dy = jvp(lambda t, m=lstm, o=options: m(t, **o)[0], (x,), (tangent,))
        weight = torch.randn_like(dy)
        (dx,) = torch.autograd.grad((lstm(x.requires_grad_(), **options)[0] * weight).sum(), x)
        assert_close((dx * tangent).sum(), (dy * weight).sum(), str(dtype).removeprefix("torch."))


@every
def test_vmap(ours, torchs):
    module = pair(ours, torchs, 3, 4)[0]
    x = torch.randn(2, *sample(module).shape, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's slow fallback for some cells
        outputs = flat(vmap(lambda t: tuple(flat(module(t))))(x))
    assert_close(outputs, [torch.stack(o) for o in zip(*(flat(module(t)) for t in x), strict=True)])


@each
def test_gradients_per_sample(ours, torchs):
    module = pair(ours, torchs, 3, 4)[0]
    x = torch.randn(5, 6, 3, dtype=torch.float64)
    weights = {k: v.detach() for k, v in module.named_parameters()}

    def loss(weights, x):
        return functional_call(module, weights, (x[:, None],))[0].sin().sum()

    per_sample = vmap(grad(loss), in_dims=(None, 0))(weights, x)
    for i, row in enumerate(x):
        alone = torch.autograd.grad(loss(dict(module.named_parameters()), row), list(module.parameters()))
        assert_close([g[i] for g in per_sample.values()], list(alone))


@every
def test_fake_tensors(ours, torchs):
    from torch._subclasses.fake_tensor import FakeTensorMode

    module = pair(ours, torchs, 3, 4)[0]
    shapes = [o.shape for o in flat(module(sample(module)))]
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = copy.deepcopy(module)
        x = mode.from_tensor(sample(module))
        outputs = flat(fake(x))
        assert [o.shape for o in outputs] == shapes
        sum(o.sum() for o in outputs).backward()
    # Outside the mode a fake input beside real weights is no business of a kernel either.
    assert [type(o) for o in flat(module(x))] == [type(o) for o in flat(torchs.forward(module, x))]


@each
def test_fake_tensors_beyond_torch(ours, torchs):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        rnn = ours(3, 4, 2, bidirectional=True)
        x, lengths = torch.randn(6, 5, 3), torch.ones(5, dtype=torch.int64)
        for options in ({"lengths": lengths}, {"lengths": [1, 2, 3, 4, 5]}, {"reset": torch.rand(6, 5) < 0.5}):
            y, *_, states = rnn(x, return_states=True, **options)
            assert y.shape == (6, 5, 8)
            assert flat([states])[0].shape == (6, 4, 5, 4)


@every
def test_modes_and_subclasses(ours, torchs):
    module, reference = pair(ours, torchs, 3, 4)
    x = sample(module)

    wanted = flat(reference(x))
    for mode in (Functions(), Ops()):
        with mode:
            assert_close(flat(module(x)), wanted)
        assert mode.seen
    marked = flat(module(x.detach().as_subclass(Marked)))
    assert [type(o) for o in marked] == [type(o) for o in flat(reference(x.detach().as_subclass(Marked)))]
    with torch.device("cpu"):
        assert_close(flat(module(x)), wanted)


@each
def test_subclasses_as_lengths_and_reset(ours, torchs):
    module = pair(ours, torchs, 3, 4)[0]
    x, lengths, reset = sample(module), torch.tensor([1, 6, 0, 3, 2]), torch.rand(6, 5) < 0.3
    wanted = flat(module(x, lengths=lengths, reset=reset, return_states=True))
    for given in (
        {"lengths": lengths.as_subclass(Marked), "reset": reset},
        {"lengths": lengths, "reset": reset.as_subclass(Marked)},
    ):
        for requires_grad in (True, False):
            outputs = flat(module.requires_grad_(requires_grad)(x, return_states=True, **given))
            assert_close([o.as_subclass(torch.Tensor) for o in outputs], wanted)
    with pytest.raises(ValueError, match=r"lengths must lie in \[0, 6\].*got 7"):
        module(x, lengths=torch.tensor([1, 7, 0, 3, 2]).as_subclass(Marked))


@each
def test_default_device(ours, torchs):
    """It is for new tensors of the caller's; results go where the input is."""
    module, reference = pair(ours, torchs, 3, 4)
    x = sample(module)
    wanted = flat(reference(x))
    with torch.device("meta"):
        results = [flat(module(x)), flat(module(x, lengths=[6] * 5)), flat(module(x, return_states=True))]
        module(x, lengths=[6, 5, 0, 3, 2], reset=torch.zeros(6, 5, dtype=torch.bool, device="cpu"))
        outputs = results[0]
        found = torch.autograd.grad(sum(o.sum() for o in outputs), [x, *module.parameters()])
        with torch.no_grad():
            results.append(flat(module(x)))
            step = flat(module.step(x[0]))
    for result in results:
        assert_close(result[: len(wanted)], wanted)
    assert_close(step[0], wanted[0][0])
    assert_close(list(found), list(torch.autograd.grad(sum(o.sum() for o in wanted), [x, *reference.parameters()])))


@every
def test_traces(ours, torchs):
    module, reference = pair(ours, torchs, 3, 4)
    x = sample(module).detach()
    with torch.no_grad():
        wanted = flat(reference(x))
        graph = make_fx(lambda t: flat(module(t)))(x)
        assert not any("fastseq" in str(node.target) for node in graph.graph.nodes)
        assert_close(graph(x), wanted)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            traced = torch.jit.trace(module, x)
        assert_close(flat(traced(x)), wanted)


@every
@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint(ours, torchs, use_reentrant):
    module, reference = pair(ours, torchs, 3, 4)
    x = sample(module)
    results = []
    for m in (module, reference):
        m.zero_grad()
        outputs = flat(checkpoint(lambda t, m=m: tuple(flat(m(t))), x, use_reentrant=use_reentrant))
        (dx,) = torch.autograd.grad(sum(o.sin().sum() for o in outputs), x) if not use_reentrant else (None,)
        if use_reentrant:
            x.grad = None
            sum(o.sin().sum() for o in outputs).backward()
            dx = x.grad.clone()
        results.append([*outputs, dx, *(p.grad for p in m.parameters() if p.grad is not None)])
    assert_close(*results)


@every
def test_saved_tensor_hooks(ours, torchs):
    """Offloading: everything a graph keeps passes through the hooks, and comes back as another tensor."""
    module, reference = pair(ours, torchs, 3, 4)
    x = sample(module)
    with torch.autograd.graph.save_on_cpu():
        outputs = flat(module(x))
    wanted = flat(reference(x))
    assert_close(gradients(outputs, [x, *module.parameters()]), gradients(wanted, [x, *reference.parameters()]))


@every
def test_autocast(ours, torchs):
    module, reference = pair(ours, torchs, 16, 32, dtype=torch.float32)
    x = torch.randn(5, 16) if isinstance(module, torch.nn.RNNCellBase) else torch.randn(6, 8, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        try:
            wanted = flat(reference(x))
        except RuntimeError as error:  # oneDNN's LSTM on processors without bfloat16
            pytest.skip(f"torch cannot: {error}")
        outputs = flat(module(x))
        assert [o.dtype for o in outputs] == [o.dtype for o in wanted]
        assert all(torch.equal(o, w) for o, w in zip(outputs, wanted, strict=True))
        if isinstance(module, torch.nn.RNNBase):
            states = flat(module(x, lengths=[6, 1, 2, 3, 0, 4, 5, 6], return_states=True))
            assert {o.dtype for o in states} == {wanted[0].dtype}
            flat(module.step(x[0]))


@each
def test_inference_mode(ours, torchs):
    rnn, reference = pair(ours, torchs, 3, 4)
    x = sample(rnn).detach()
    wanted = flat(reference(x))
    with torch.inference_mode():
        assert_close(flat(rnn(x)), wanted)
        made_inside = copy.deepcopy(rnn)
        for _ in range(2):
            assert_close(flat(made_inside(x)), wanted)
    assert_close(flat(rnn(x)), wanted)


@pytest.mark.parametrize("cell", MODULES)
def test_compile(cell):
    torch._dynamo.reset()
    rnn = make(cell, 3, 4, 2, bidirectional=True)
    x = torch.randn(6, 5, 3, dtype=torch.float64, requires_grad=True)
    compiled = torch.compile(rnn, backend="aot_eager")
    reset = torch.rand(6, 5) < 0.3
    for options in ({}, {"lengths": torch.tensor([1, 6, 0, 3, 2]), "reset": reset, "return_states": True}):
        outputs, wanted = flat(compiled(x, **options)), flat(rnn(x, **options))
        assert_close(outputs, wanted)
        assert_close(gradients(outputs, [x, *rnn.parameters()]), gradients(wanted, [x, *rnn.parameters()]))
        with torch.no_grad():
            assert_close(flat(compiled(x, **options)), wanted)
    with pytest.raises(ValueError, match=r"lengths must lie in \[0, 6\]"):
        compiled(x, lengths=torch.tensor([1, 7, 0, 3, 2]))
    fused = torch.compile(fastseq.fuse(torch.nn.Sequential(torch.nn.GRU(3, 4).double())), backend="aot_eager")
    fused(x)[0].sum().backward()


@pytest.mark.parametrize("cell", MODULES)
def test_compile_whole_graph(cell, route):
    """With kernels nothing breaks the graph, for any number of steps."""
    if route == "torch":
        pytest.skip("torch's own classes break the graph too")
    torch._dynamo.reset()
    rnn = make(cell, 3, 4, 2)
    compiled = torch.compile(rnn, backend="aot_eager", fullgraph=True, dynamic=True)
    step = torch.compile(rnn.step, backend="aot_eager", fullgraph=True)
    for steps, batch in itertools.product([6, 9], [5, 2]):
        x = torch.randn(steps, batch, 3, dtype=torch.float64, requires_grad=True)
        hx = random_hx(rnn, batch)
        outputs, wanted = flat(compiled(x, hx)), flat(rnn(x, hx))
        assert_close(outputs, wanted)
        assert_close(gradients(outputs, [x, *rnn.parameters()]), gradients(wanted, [x, *rnn.parameters()]))
    assert_close(flat(step(x[0], hx)), flat(rnn.step(x[0], hx)))


@each
def test_traces_follow_lengths_and_reset(ours, torchs):
    class Ragged(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = pair(ours, torchs, 3, 4, bidirectional=True)[0]

        def forward(self, x, lengths, reset):
            return self.rnn(x, lengths=lengths, reset=reset)[0], self.rnn(x, lengths=[6, 2, 0, 4, 1])[0]

    def example():
        return torch.randn(6, 5, 3, dtype=torch.float64), torch.randint(0, 7, (5,)), torch.rand(6, 5) < 0.3

    model = Ragged().eval()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced = torch.jit.trace(model, example())
    for inputs in (example(), example()):
        assert_close(list(traced(*inputs)), list(model(*inputs)))


def test_export():
    """The graph runs without fastseq."""
    for ours, torchs in SEQUENCES[:3]:
        rnn, reference = pair(ours, torchs, 3, 4)
        x = torch.randn(6, 5, 3, dtype=torch.float64)
        with torch.no_grad():
            program = torch.export.export(rnn.eval(), (x,), strict=False)
            assert "fastseq" not in str(program.graph)
            assert_close(flat(program.module()(x)), flat(reference(x)))
