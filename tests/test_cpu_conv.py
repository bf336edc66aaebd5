import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxft.nets import cpu_conv

LAYOUT = ("NHWC", "HWIO", "NHWC")
CASES = {  # height, width, channels in and out, kernel, stride, padding
    "3×3": (20, 23, 32, 40, (3, 3), 1, "SAME"),
    "3×3 without padding": (20, 23, 32, 40, (3, 3), 1, "VALID"),
    "3×3 padded unevenly": (21, 22, 33, 32, (3, 3), 1, ((0, 1), (2, 1))),
    "3×3 on a small map": (7, 8, 32, 40, (3, 3), 1, "SAME"),
    "3×3 of few channels": (16, 17, 3, 40, (3, 3), 1, "SAME"),
    "3×3 at stride 2": (16, 17, 9, 4, (3, 3), 2, "SAME"),
    "3×3 at stride 2 without padding": (17, 16, 9, 4, (3, 3), 2, "VALID"),
    "1×1": (14, 13, 5, 7, (1, 1), 1, "VALID"),
    "1×1 at stride 2": (14, 13, 5, 7, (1, 1), 2, "SAME"),
    "7×1": (15, 12, 5, 7, (7, 1), 1, "SAME"),
    "1×7": (15, 12, 5, 7, (1, 7), 1, "SAME"),
    "5×5": (13, 14, 5, 7, (5, 5), 1, "SAME"),
    "7×7 at stride 2": (15, 12, 3, 7, (7, 7), 2, ((3, 3), (3, 3))),
}


@pytest.fixture(autouse=True)
def small_ones_too(monkeypatch):
    monkeypatch.setattr(cpu_conv, "MIN_MACS", 0)


def draw(case, batch=3):
    height, width, fan_in, fan_out, size, stride, padding = CASES[case]
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(batch, height, width, fan_in)), rng.normal(size=(*size, fan_in, fan_out))

    def through(conv):
        return lambda x, kernel: conv(x, kernel, (stride, stride), padding, dimension_numbers=LAYOUT)

    dy = rng.normal(size=jax.eval_shape(through(lax.conv_general_dilated), x, kernel).shape)
    return through, x, kernel, dy


def with_gradients(function, x, kernel, dy):
    y, transposed = jax.vjp(function, x, kernel)
    return (y, *transposed(dy))


@pytest.mark.parametrize("case", CASES)
def test_output_and_gradients_are_exact_to_rounding(case):
    """Bug: a tile at the edge, an odd side, a pad, a stride or the turned kernel is wrong; or 1e-6 is not kept."""
    through, *arrays = draw(case)
    with jax.enable_x64(True):
        truth = with_gradients(through(lax.conv_general_dilated), *map(jnp.asarray, arrays))
        assert truth[0].dtype == jnp.float64
    ours = jax.jit(lambda *a: with_gradients(through(cpu_conv.conv_general_dilated), *a))(*map(np.float32, arrays))
    for what, found, expected in zip(("output", "input", "kernel"), ours, truth, strict=True):
        assert found.dtype == jnp.float32 and found.shape == expected.shape
        error = np.abs(np.asarray(found) - np.asarray(expected)).max() / np.abs(np.asarray(expected)).max()
        assert error < 1e-6, f"{what}: {error:.1e}"


def test_a_batch_of_any_size():
    """Bug: images are lost or mixed where the batch does not divide into chunks."""
    for batch in (1, 5, 8):
        through, x, kernel, _ = draw("3×3", batch)
        ours = through(cpu_conv.conv_general_dilated)(*map(jnp.float32, (x, kernel)))
        plain = through(lax.conv_general_dilated)(*map(jnp.float32, (x, kernel)))
        np.testing.assert_allclose(ours, plain, atol=3e-6 * float(jnp.abs(plain).max()))


@pytest.mark.parametrize("case", CASES)
def test_other_platforms_get_xlas_own(case, monkeypatch):
    """Bug: a GPU computes tiles or products instead of convolutions."""
    through, *arrays = draw(case)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    programs = [
        str(jax.make_jaxpr(lambda *a, conv=conv: with_gradients(through(conv), *a))(*map(np.float32, arrays)))
        for conv in (cpu_conv.conv_general_dilated, lax.conv_general_dilated)
    ]
    assert programs[0] == programs[1] and programs[0].count("conv_general_dilated[") == 3


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_other_dtypes_are_left_to_xla(dtype):
    """Bug: bfloat16 goes through transforms that lose its few digits."""
    through, x, kernel, _ = draw("3×3")
    arrays = jnp.asarray(x, dtype), jnp.asarray(kernel, dtype)
    ours = through(cpu_conv.conv_general_dilated)(*arrays)
    np.testing.assert_array_equal(ours, through(lax.conv_general_dilated)(*arrays))


@pytest.mark.parametrize("options", [{"feature_group_count": 2}, {"rhs_dilation": (2, 2)}, {"lhs_dilation": (2, 2)}])
def test_grouped_and_dilated_convolutions_are_left_to_xla(options):
    """Bug: an option of `lax.conv_general_dilated` is dropped."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 15, 16, 64)), jnp.float32)
    kernel = jnp.asarray(rng.normal(size=(3, 3, 64 // options.get("feature_group_count", 1), 64)), jnp.float32)
    arguments = (x, kernel, (1, 1), ((0, 0), (0, 0)))
    ours = cpu_conv.conv_general_dilated(*arguments, dimension_numbers=LAYOUT, **options)
    plain = lax.conv_general_dilated(*arguments, dimension_numbers=LAYOUT, **options)
    np.testing.assert_array_equal(ours, plain)
