"""One GPU, or with HFKIT_GPU_DRY=1 the CPU in its place, as far as that means anything."""

import gc
import os

import pytest

# CUDA reads it at its first matrix product in the process. Tests here need kernels that give the same bits twice.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
DRY = os.environ.get("HFKIT_GPU_DRY") == "1"


def pytest_collection_modifyitems(items) -> None:
    """Skip what needs a GPU, with the reason that its marker gives."""
    import torch

    here = [item for item in items if "tests/gpu/" in str(item.path)]
    for item in here:
        real = item.get_closest_marker("real_gpu")
        if not DRY and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no GPU: HFKIT_GPU_DRY=1 runs what a CPU can"))
        elif DRY and real:
            item.add_marker(pytest.mark.skip(reason=f"needs a GPU: {real.args[0]}"))


def pytest_configure(config) -> None:
    config.addinivalue_line("markers", "real_gpu(reason): a CPU has nothing like it")


@pytest.fixture(scope="session")
def device() -> str:
    return "cpu" if DRY else "cuda"


@pytest.fixture(autouse=True)
def _memory():
    """What one test leaves on the GPU is no matter for the next."""
    import torch

    yield
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
