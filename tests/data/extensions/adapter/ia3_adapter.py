"""(IA)³ (Liu et al. 2022): a factor for each output of a layer."""

from safelight.weights.adapter_kinds import AdapterKind


def fits(shapes, weight_shape):
    return shapes.get("scale") == weight_shape[:1]


def difference(tensors, weight):
    factors = tensors["scale"].reshape(-1, *(1 for _ in weight.shape[1:]))
    return weight * factors - weight


IA3 = AdapterKind({".ia3_scale": "scale"}, fits, "ia3_adapter:difference")
