"""Two and four processes with a share of a batch each against one with the whole: equal losses and, under DDP, equal
gradients, whether statistics are exchanged as embeddings or as sums.
"""

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tiny import gradients, images, pair_terms, seeded, sjea_level, tiny_model, tiny_sjea
from torch.nn.parallel import DistributedDataParallel

from modeling_cjepa.configuration_cjepa import REGULARIZERS
from modeling_cjepa.losses_cjepa import (
    batch_covariances,
    block_vicreg_terms,
    covariance_term,
    exchange_form,
    gather,
    global_covariances,
    global_vicreg_terms,
    variance_term,
)
from trainers.batch_norm import synchronize_batch_norms

WORLD_SIZES = (2, 4)
# images of all processes for which a model of 32 features, or an expander of 24, gathers embeddings or reduces sums
FEW, MANY = 8, 32
# readings of the regulariser, without and with an expander, whose batch norm shall see the global batch, too
CASES = [(reading, expander, FEW) for reading in REGULARIZERS for expander in (None, 8)]
CASES += [(reading, None, MANY) for reading in REGULARIZERS] + [("pair", 8, MANY)]
# level 0 reduces where level 1, of 48 features, gathers
STACK = {"upper_levels": [{"hidden_size": 48, "regularizer": "pair"}], "min_context_patches": 8}
TERMS = {
    "pair, gathered": (FEW, lambda x: pair_terms(gather(x[:, 0]), gather(x[:, 1]))),
    "blocks, gathered": (FEW, lambda x: block_vicreg_terms(gather(x))),
    "blocks, by the form for few": (FEW, global_vicreg_terms),
    "blocks, by the form for many": (MANY, global_vicreg_terms),
    "pair, by the form for many": (MANY, lambda x: global_vicreg_terms(x[:, :2])),
}


def share(x, rank, world_size):
    """The rows of one process."""
    return x.chunk(world_size)[rank]


def weighted(terms):
    return 25 * terms["invariance"] + 25 * terms["variance"] + terms["covariance"]


def terms_and_gradients(name, rank=0, world_size=1):
    """VICReg's terms on this process's rows, and the gradient of those rows as DDP's averaging would leave it."""
    num_images, function = TERMS[name]
    # far from zero, where a second moment that is not centred loses its digits
    rows = torch.randn(num_images, 3, 12, generator=seeded()) + 100.0
    x = share(rows, rank, world_size).clone().requires_grad_()
    terms = function(x)
    weighted(terms).backward()
    return {term: value.item() for term, value in terms.items()}, x.grad / world_size


def loss_and_gradients(reading, expander, num_images, rank=0, world_size=1, **changes):
    """The pre-training model's loss on this process's images, with given masks, and its gradients under DDP."""
    changes = {"regularizer_weight": 0.01} | changes
    num_views = 2 if reading == "views" else 1
    model = tiny_model(regularizer=reading, expander_hidden_size=expander, num_views=num_views, **changes)
    masks = model.sample_masks(num_images * num_views, generator=seeded())
    views = images(num_images * num_views)
    views = views.unflatten(0, (num_images, 2)) if num_views == 2 else views
    batch = [share(x, rank, world_size) for x in (views, *masks)]
    return of_model(model, batch, world_size)


def sjea_loss_and_gradients(num_images, rank=0, world_size=1):
    """The loss of a stack of ResNets on this process's views, and its gradients under DDP."""
    model = tiny_sjea(sjea_level(), sjea_level(reads="expanded", expander_sizes=[24]))
    views = torch.randn(num_images, 2, 3, 32, 32, generator=seeded()) * 2 + 1
    if world_size > 1:
        model = synchronize_batch_norms(model, torch.device("cpu"))
    return of_model(model, [share(views, rank, world_size)], world_size)


def of_model(model, batch, world_size):
    wrapped = DistributedDataParallel(model) if world_size > 1 else model
    output = wrapped(*batch)
    output.loss.backward()
    terms = {name: term.item() for name, term in output.loss_terms.items()}
    buffers = {name: buffer.float() for name, buffer in model.named_buffers()}
    return output.loss.item(), terms, gradients(model), buffers


def everything(rank=0, world_size=1):
    found = {name: terms_and_gradients(name, rank, world_size) for name in TERMS}
    found |= {case: loss_and_gradients(*case, rank, world_size) for case in CASES}
    found["stack"] = loss_and_gradients("context", None, MANY, rank, world_size, **STACK)
    found["prediction"] = loss_and_gradients("context", None, FEW, rank, world_size, regularizer_weight=0.0)
    found |= {("sjea", number): sjea_loss_and_gradients(number, rank, world_size) for number in (FEW, MANY)}
    return found


def work(rank, world_size, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size)
    assert dist.get_world_size() == world_size
    torch.save(everything(rank, world_size), f"{folder}/rank{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def whole():
    """What one process finds on whole batches."""
    return everything()


@pytest.fixture(scope="module", params=WORLD_SIZES)
def found(request, tmp_path_factory):
    """What each of several processes found."""
    folder = tmp_path_factory.mktemp("processes")
    mp.spawn(work, (request.param, str(folder)), nprocs=request.param)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(request.param)]


def test_both_forms_are_taken():
    for world_size in WORLD_SIZES:
        for width in (12, 24, 32):
            assert exchange_form(FEW // world_size, width, world_size) == "gathered"
            assert exchange_form(MANY // world_size, width, world_size) == "reduced"
        assert exchange_form(MANY // world_size, 48, world_size) == "gathered"


@pytest.mark.parametrize("name", TERMS)
def test_terms_are_those_of_the_global_batch(name, found, whole):
    terms, gradient = whole[name]
    assert gradient.abs().max() > 0.01
    for rank, of_rank in enumerate(found):
        theirs, of_rows = of_rank[name]
        assert theirs == pytest.approx(terms, abs=1e-5, rel=1e-5)
        torch.testing.assert_close(of_rows, share(gradient, rank, len(found)), rtol=1e-5, atol=1e-5)


def assert_alike(found, whole, local_terms, rtol, atol):
    """Losses whose mean is that of one process, global terms that are on each, equal gradients and batch norms."""
    loss, terms, gradients_, buffers = whole
    assert sum(theirs for theirs, *_ in found) / len(found) == pytest.approx(loss, abs=1e-6, rel=1e-6)
    for _, theirs, *tensors in found:
        for name in terms.keys() - local_terms:
            assert theirs[name] == pytest.approx(terms[name], abs=1e-6, rel=1e-5), name
        for ours, expected in zip(tensors, (gradients_, buffers), strict=True):
            assert ours.keys() == expected.keys()
            for name, tensor in expected.items():
                torch.testing.assert_close(ours[name], tensor, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", [*CASES, "stack", "prediction"], ids=str)
def test_loss_and_gradients_are_those_of_the_global_batch(case, found, whole):
    local = {"prediction", "level1_prediction"}
    if case in ("stack", "prediction") or case[0] == "context":
        local.add("invariance")  # which is the prediction loss in this reading
    assert_alike([of_rank[case] for of_rank in found], whole[case], local, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("num_images", [FEW, MANY])
def test_stack_of_resnets_sees_the_global_batch(num_images, found, whole):
    expected = whole["sjea", num_images]
    # relative to the largest: a bias before a batch norm has no gradient but rounding
    atol = 1e-5 * max(gradient.abs().max().item() for gradient in expected[2].values())
    assert_alike([of_rank["sjea", num_images] for of_rank in found], expected, set(), rtol=1e-4, atol=atol)


@pytest.mark.parametrize("function", [variance_term, covariance_term])
def test_one_process_exchanges_nothing(function):
    z = torch.randn(6, 2, 5, generator=seeded())
    assert torch.equal(function(global_covariances(z)), function(batch_covariances(z)))
