"""What a GPU, or Apple's MPS, would be told: on pretended devices that compute by the processor and are strict otherwise."""

import subprocess
import sys
from multiprocessing import popen_fork
from pathlib import Path
from warnings import warn

import numpy as np
import pytest
import torch
import zoo
from pretended import Machine, done
from tiny import noise_images, save_images, save_model

import mlfusion
from mlfusion import datasets, models
from mlfusion.errors import MlfusionError, Unavailable, is_device_failure, is_shortage
from mlfusion.extraction import loader
from mlfusion.extraction.forward import Forward
from mlfusion.extraction.loader import Loader
from mlfusion.extraction.transfers import Transfers
from mlfusion.models.backbone import Backbone
from mlfusion.models.preprocessing import Finisher, Steps
from mlfusion.system import devices, memory
from mlfusion.workflows import doctor

pytestmark = pytest.mark.device
PAIRS = frozenset({(1, "cls"), (4, "ap"), (4, "all"), (4, "std"), (4, "grid2")})


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(save_model("vit", tmp_path_factory.mktemp("model") / "tiny-vit"))


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> str:
    return str(save_images(tmp_path_factory.mktemp("data") / "colours", {"train": 9, "test": 2}))


@pytest.fixture
def gpu(monkeypatch) -> Machine:
    return Machine().installed(monkeypatch)


@pytest.fixture
def apple(monkeypatch) -> Machine:
    return Machine("mps", 1).installed(monkeypatch)


def tokens_of(model: str, images: str, cache: Path, **options: object) -> np.ndarray:
    [one] = mlfusion.extract(
        model, images, splits="train", tokens="cls,ap,all", dtype="float32", cache=cache, batch_size=4, **options
    )
    parts = [one.entry.read([1, 2, 3, 4], [kind]).reshape(27, -1) for kind in ("cls", "ap", "all")]
    return np.concatenate(parts, axis=1)


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_an_extraction_on_any_gpu_stores_what_it_computed(device, gpu, model, images, tmp_path):
    """Copies are garbage until the right queue was waited for, whichever GPU is the current one."""
    want = tokens_of(model, images, tmp_path / "cpu", device="cpu")
    with gpu:
        found = tokens_of(model, images, tmp_path / "gpu", device=device)
    np.testing.assert_array_equal(found, want)
    assert gpu.faults == []
    assert gpu.current == 0


def test_what_crosses_the_bus_is_bytes_and_no_batch_waits(gpu, model):
    """A quarter of the floats; and the processor queues one batch after another without waiting for the device."""
    pictures = _pictures(model, 8)
    with gpu:
        forward = Forward(
            Backbone(models.locate(model), "cuda:1"), Backbone(models.locate(model)).preprocessing, PAIRS, 4
        )
        gpu.pinned.append(range(pictures.data_ptr(), pictures.data_ptr() + pictures.nbytes))
        gpu.sent.clear(), gpu.waits.clear(), gpu.recorded.clear()
        pieces = forward.pieces(pictures, PAIRS, lambda tokens: list(tokens.values()))
        fetched, wait = forward.transfers.fetch([values for piece in pieces for values in piece])
        assert not gpu.waits
        assert all(values.isnan().all() for values in fetched)  # nobody has waited yet
        wait()
    assert not any(values.isnan().any() for values in fetched)
    assert gpu.sent == [("torch.uint8", 4 * 3 * 32 * 32)] * 2
    # Both directions tell the allocator that a second queue uses the memory.
    assert gpu.recorded == [4 * 3 * 32 * 32] * 2 + [values.nbytes for values in fetched]
    assert gpu.faults == []


def _pictures(model: str, count: int) -> torch.Tensor:
    steps = Backbone(models.locate(model)).preprocessing
    return torch.stack([torch.tensor(steps.picture(image)) for image in noise_images(count)])


def test_the_copies_of_pictures_and_tokens_have_queues_of_their_own(gpu):
    with gpu:
        transfers = Transfers(torch.device("cuda:1"))
        sent, copied = transfers.send(torch.ones(3))
        computing = gpu.current_stream("cuda:1")
        assert sent.queue not in (computing, gpu.current_stream("cuda:0"))
        doubled = sent * 2  # which waits for the copy: else a fault
        [back], arrived = transfers.fetch([doubled])
        copied(), arrived()
    assert back.tolist() == [2, 2, 2]
    assert gpu.faults == []
    with gpu, gpu.stream(computing):  # and a copy back that does not wait for the product is noted
        late = doubled * 2
        with gpu.stream(transfers._outgoing):
            torch.empty(3).copy_(late, non_blocking=True)
    assert gpu.faults == ["copy_ uses what another queue still computes"]


# --- the same bits ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [1 / 255, 0.00392156862745098, 1 / 127.5, 1 / 256, None])
@pytest.mark.parametrize("normalises", [True, False])
def test_pictures_are_finished_on_a_device_with_the_bits_of_the_processor(factor, normalises, gpu, apple):
    """Also where a division is a product with the reciprocal, as on CUDA: there are no divisions and no float64 at all."""
    colours = {"image_mean": (0.485, 0.456, 0.406), "image_std": (0.229, 0.224, 0.225)} if normalises else {}
    steps = Steps(size=(16, 16), crop_size=None, rescale_factor=factor, **colours)
    pictures = torch.randint(0, 256, (5, 3, 16, 16), dtype=torch.uint8)
    want = steps.finish(pictures)
    for kind in ("cuda", "mps"):
        machine = Machine(kind, 1)
        Machine.here = machine
        with machine:
            finish = Finisher(steps, torch.device(kind))
            on_device = pictures.to(kind)
            machine.calls.clear(), machine.waits.clear()
            finished = finish(on_device)
            assert not machine.waits
            assert not {"div", "div_", "double", "mul", "mul_"} & machine.calls.keys()
            assert torch.equal(finished.cpu(), want)


def test_pictures_of_floats_are_finished_without_a_wait(gpu):
    steps = Steps(
        size=(16, 16), crop_size=None, kernel="torch-float32", image_mean=(0.4, 0.5, 0.6), image_std=(0.2, 0.3, 0.4)
    )
    pictures = torch.rand(2, 3, 16, 16)
    with gpu:
        finish, on_device = Finisher(steps, torch.device("cuda")), pictures.to("cuda")
        gpu.waits.clear()
        finished = finish(on_device)
        assert not gpu.waits
        assert torch.equal(finished.cpu(), steps.finish(pictures))


def test_products_are_exact_and_cudnn_stays_on(gpu, model):
    """Convolutions and products in float32 are not TF32, whatever the process has set; cuDNN is neither on nor off by us."""
    cudnn = torch.backends.cudnn
    seen = []
    torch.set_float32_matmul_precision("high")
    before = cudnn.enabled, cudnn.allow_tf32, torch.get_float32_matmul_precision()
    try:
        with gpu:
            backbone = Backbone(models.locate(model), "cuda:1")
            backbone.anatomy.blocks[0].register_forward_pre_hook(
                lambda *_: seen.append((cudnn.enabled, cudnn.allow_tf32, torch.get_float32_matmul_precision()))
            )
            backbone(torch.zeros(1, 3, 32, 32), PAIRS)
        assert seen == [(True, False, "highest")]
        assert before == (cudnn.enabled, cudnn.allow_tf32, torch.get_float32_matmul_precision()) == (True, True, "high")
    finally:
        torch.set_float32_matmul_precision("highest")


NEWER = """
import sys, torch
torch.backends.cuda.matmul.fp32_precision = "tf32"
torch.backends.cudnn.conv.fp32_precision = "tf32"
torch.backends.cudnn.rnn.fp32_precision = "ieee"
from mlfusion.system.devices import exact_products
with exact_products(torch.device("cuda")):
    print(torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision)
print(torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision)
"""


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="this torch has the older interface alone")
def test_whoever_has_set_tf32_by_the_newer_interface_meets_no_error():
    said = subprocess.run([sys.executable, "-c", NEWER], capture_output=True, text=True, check=True).stdout
    assert said.split() == ["ieee", "ieee", "tf32", "tf32"]


# --- MPS -------------------------------------------------------------------------------------------------------------


def test_an_extraction_on_mps_has_no_float64_and_no_copy_from_memory_that_goes(apple, model, images, tmp_path):
    want = tokens_of(model, images, tmp_path / "cpu", device="cpu")
    with apple:
        found = tokens_of(model, images, tmp_path / "mps", device="mps")
    np.testing.assert_array_equal(found, want)
    assert apple.faults == []
    assert apple.actions == []  # memory is locked for CUDA alone


UNLIKE = ("SigLIP 2, NaFlex", "Swin", "ConvNeXt", "MAE", "Hiera", "V-JEPA 2")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name.startswith(UNLIKE) else pytest.mark.long)
        for name in sorted(zoo.ZOO)
    ],
)
def test_every_family_extracts_on_mps(name, monkeypatch, tmp_path):
    """All tensors are on the device, and none is float64; the numbers are the processor's."""
    checkpoint = models.locate(str(zoo.save(name, tmp_path / "m")))
    near = Backbone(checkpoint)
    pairs = [
        (layer, kind) for layer in (1, near.depth) for kind in ("ap", "all", "std", "max") if near.count(layer, kind)
    ]
    pixels = torch.randn(2, 3, *near.preprocessing.pixels, generator=torch.Generator().manual_seed(0))
    want = near(pixels, pairs)
    with Machine("mps", 1).installed(monkeypatch):
        far = Backbone(checkpoint, "mps")
        assert (far.depth, far.kinds) == (near.depth, near.kinds)
        found = {pair: tokens.cpu() for pair, tokens in far(pixels, pairs).items()}
    for pair in pairs:
        torch.testing.assert_close(found[pair], want[pair], atol=1e-6, rtol=1e-5)


# --- what can go wrong -----------------------------------------------------------------------------------------------


def test_little_memory_gives_smaller_batches_then_one_sentence(gpu, model, images, tmp_path):
    """Also where it is the reduction that finds too little, and not the model."""
    want = tokens_of(model, images, tmp_path / "cpu", device="cpu")
    gpu.room = 3 * 4 * 17 * 32 * 4  # the tokens of all layers of three images
    with gpu:
        [one] = mlfusion.extract(
            model,
            images,
            splits="train",
            tokens="all",
            dtype="float32",
            cache=tmp_path / "b",
            batch_size=8,
            device="cuda:1",
        )
    [run] = one.entry.path.glob("runs/*.json")
    assert '"out_of_memory": true' in run.read_text()
    assert '"batch_size": 2' in run.read_text()
    np.testing.assert_allclose(
        one.entry.read([1, 2, 3, 4], ["all"]).reshape(27, -1), want[:, -4 * 17 * 32 :], atol=1e-6
    )
    assert "empty 1" in gpu.actions  # of the model's device
    assert gpu.current == 0
    gpu.room = None
    with gpu:
        backbone = Backbone(models.locate(model), "cuda:1")
        forward = Forward(backbone, backbone.preprocessing, PAIRS, 4)
        gpu.room = 1000
        with pytest.raises(MlfusionError, match=r"no memory on cuda:1 for one image in tiny-vit; allowed: .* What was"):
            forward(_pictures(model, 3), PAIRS)
    gpu.room = 1000
    with gpu, pytest.raises(Unavailable, match=r"no memory on cuda:1 for tiny-vit \(CUDA out of memory.*--device cpu"):
        tokens_of(model, images, tmp_path / "d", device="cuda:1")


def test_a_gpu_that_is_lost_leaves_what_was_finished_and_the_same_command_goes_on(
    gpu, model, images, tmp_path, monkeypatch
):
    monkeypatch.setattr("mlfusion.store.stream.SHARD_BYTES", 4096)
    want = tokens_of(model, images, tmp_path / "cpu", device="cpu")
    with gpu:
        Backbone(models.locate(model), "cuda:1")
    steps, gpu.clock = gpu.clock, 0
    gpu.breaks_at = 2 * steps
    with gpu, pytest.raises(Unavailable) as lost:
        tokens_of(model, images, tmp_path / "gpu", device="cuda:1")
    assert str(lost.value) == (
        "cuda:1 failed (CUDA error: unspecified launch failure); what was finished is kept. Run the same command again, which "
        "goes on from there; if it fails again, look at the GPU (nvidia-smi), or take --device cpu"
    )
    gpu.breaks_at = None
    with gpu:
        [one] = mlfusion.extract(
            model, images, splits="train", tokens="cls,ap,all", dtype="float32", cache=tmp_path / "gpu", device="cuda:1"
        )
        found = tokens_of(model, images, tmp_path / "gpu", device="cuda:1")
    assert 0 < one.images_written <= 27
    np.testing.assert_allclose(found, want, atol=1e-6)


def test_a_device_that_is_not_there_is_named_with_those_that_are(gpu, monkeypatch):
    assert devices.pick_device("cuda:1") == "cuda:1"
    with pytest.raises(
        Unavailable, match=r"no device 'cuda:9' on this machine; allowed: --device auto, cuda, cpu, cuda:0, cuda:1"
    ):
        devices.pick_device("cuda:9")
    with pytest.raises(Unavailable, match=r"no device 'mps' on this machine; allowed"):
        devices.pick_device("mps")


OLD = (
    "CUDA initialization: The NVIDIA driver on your system is too old (found version 11040). Please update your GPU driver by "
    "downloading and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx Alternatively, go to"
)


def test_a_driver_that_is_too_old_is_said_once_and_the_processor_is_taken(gpu, monkeypatch, caplog):
    """torch says it by a warning, and only once in a process."""
    monkeypatch.setattr(devices, "_refusal", "")
    told = iter([True])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: next(told, None) and warn(OLD, stacklevel=2))
    for _ in range(2):
        with pytest.raises(
            Unavailable, match=r"\(The NVIDIA driver on your system is too old \(found version 11040\); update the"
        ):
            devices.pick_device("cuda")
    assert devices.pick_device("auto") == "cpu"
    assert "the GPU cannot be used (The NVIDIA driver on your system is too old" in caplog.text


def test_a_torch_without_cuda_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(Unavailable, match=r"built without CUDA; .*allowed: --device auto, cpu"):
        devices.pick_device("cuda")


def test_the_doctor_tries_a_product_on_the_gpu(gpu, monkeypatch):
    with gpu:
        found = {one.check: one for one in doctor.doctor(device="cuda:1")}["device"]
        assert (found.state, found.description) == ("ok", "cuda:1: pretended, 8.6 of 17.2 GB free")
        assert "--compute auto" in found.advice
        gpu.breaks_at = 0
        broken = {one.check: one for one in doctor.doctor(device="cuda:1")}["device"]
    assert broken.state == "problem"
    assert "cuda:1 failed (CUDA error" in broken.description


@pytest.mark.parametrize(
    ("error", "short", "failed"),
    [
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True, False),
        (RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"), True, False),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB"), True, False),
        (torch.AcceleratorError("CUDA error: out of memory"), True, False),
        (MemoryError(), True, False),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered"), False, True),
        (RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"), False, True),
        (RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"), False, False),
        (ValueError("CUDA error: no"), False, False),
    ],
)
def test_a_shortage_and_a_failure_are_told_apart(error, short, failed):
    assert (is_shortage(error), is_device_failure(error)) == (short, failed)


# --- memory ----------------------------------------------------------------------------------------------------------


def test_what_torch_keeps_for_reuse_is_free(gpu, monkeypatch):
    kept = {"cuda:0": (0, 0), "cuda:1": (5 << 30, 3 << 30)}
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: kept[str(device)][0])
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: kept[str(device)][1])
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: ((1 << 30) + (str(device) == "cuda:1"), 80 << 30))
    assert memory.available("cuda:1") == (3 << 30) + 1
    assert memory.available("cuda:0") == 1 << 30


def test_the_memory_of_a_pass_is_measured_on_its_own_device(gpu, monkeypatch):
    asked = []
    for name in ("reset_peak_memory_stats", "memory_allocated", "max_memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device=None: asked.append(str(device)) or len(asked))
    with memory.measured("cuda:1") as taken:
        pass
    assert taken() == 1
    assert asked == ["cuda:1"] * 3


# --- the loader ------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not loader.can_fork(), reason="this system does not fork")
def test_workers_are_forked_before_memory_is_locked_and_locked_for_every_gpu(gpu, images):
    """Some drivers take locked memory from a fork, so that every worker would be killed."""
    launched = popen_fork.Popen._launch

    def launch(self, process):
        gpu.actions.append("fork")
        return launched(self, process)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(popen_fork.Popen, "_launch", launch)
        split = datasets.load(images).split("train")
        feed = Loader(split, Steps(size=(4, 4), crop_size=None), 8, workers=3, processes=True, pinned=True)
        seen = [
            row for batch in feed((range(at, min(at + 8, 27)), None) for at in range(0, 27, 8)) for row in batch.rows
        ]
    assert seen == list(range(27))
    assert gpu.actions == ["fork"] * 3 + ["lock 1", "unlock"]


def test_where_no_memory_can_be_locked_the_loader_goes_on_and_says_so(gpu, images, monkeypatch, caplog):
    split = datasets.load(images).split("train")
    refusing = type("Runtime", (), {"cudaHostRegister": lambda *_: 2, "cudaHostUnregister": lambda *_: 1 / 0})()
    monkeypatch.setattr(torch.cuda, "cudart", lambda: refusing)
    with gpu:
        feed = Loader(split, Steps(size=(4, 4), crop_size=None), 9, workers=2, pinned=True)
        assert sum(len(batch.rows) for batch in feed((range(at, at + 9), None) for at in (0, 9, 18))) == 27
    assert "the system does not lock 0 MB of memory for copies to the GPU (error 2)" in caplog.text


# --- the plan --------------------------------------------------------------------------------------------------------


def test_a_plan_waits_for_the_device_and_says_what_is_the_limit(gpu, model, images, tmp_path):
    with gpu:
        plan = mlfusion.plan(model, images, cache=tmp_path, device="cuda:1", batch_size=4, trial=0.05)
    assert plan.limit in ("decoding", "the forward pass")
    assert plan.to_json()["limit"] == plan.limit
    queues = [queue for queue in gpu.queues if queue.work]
    assert queues
    assert all(job is done for queue in queues for job in queue.work)
