"""The finaliser of SplitMix64 (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators")."""

import numpy as np

_MIXERS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def mixed(values: np.ndarray) -> np.ndarray:
    """uint64 to uint64, one to one: each input bit flips about half of the output bits. It wraps, as intended."""
    for shift, mixer in _MIXERS:
        values = (values ^ (values >> np.uint64(shift))) * np.uint64(mixer)
    return values ^ (values >> np.uint64(31))
