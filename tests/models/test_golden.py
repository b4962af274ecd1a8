import pytest

from tests.golden import golden_shapes, golden_weights, load_golden


@pytest.mark.parametrize("name", ["sr_unet", "refiner_unet", "movq"])
def test_the_recipe_gives_the_recorded_weights(name):
    tensors, metadata = load_golden(name)
    weights = golden_weights(golden_shapes(f"tiny_state_dicts/{name}"), metadata["seed"])

    checksum = sum(value.double().sum().item() for value in weights.values())

    assert checksum == pytest.approx(tensors["parameter_checksum"].item(), abs=1e-3)
