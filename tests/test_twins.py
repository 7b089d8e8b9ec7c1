"""Devices that read the same rows are compared: a flipped bit on one of eight is found, and the device named."""

from eight_devices import run_on_eight_devices

FLIPS = """
import jax, numpy as np, re, sys
from aurora_jax.data.batches.loader import Batch
from aurora_jax.errors import ChipFault
from aurora_jax.model.config import ComputeConfig, ModelConfig
from aurora_jax.model.decoder import initial_parameters
from aurora_jax.model.likelihood import Likelihood
from aurora_jax.model.mesh import MeshConfig, make_mesh
from aurora_jax.model.sharding import parameter_shardings
from aurora_jax.train.survival.twins import require_twins

B, L, V = 16, 16, 64
tokens = np.random.default_rng(0).integers(V, size=(B, L + 1)).astype(np.int32)
ones, zeros = np.ones((B, L), np.float32), np.zeros((B, L), np.int32)
batch = Batch(tokens[:, :-1], tokens[:, 1:], ones, zeros, np.tile(np.arange(L, dtype=np.int32), (B, 1)), zeros[:, 0])
model = ModelConfig(V, L, 32, 2, 4, 64).with_dropout(0.0)

def rows(numbers):
    return Batch(*(array[numbers] for array in batch))

class Faulty:
    '''A likelihood of which one device flips the lowest bit of one value, in the calls that are numbered.'''
    def __init__(self, likelihood, device, calls):
        self.mesh, self.likelihood, self.device, self.calls, self.called = likelihood.mesh, likelihood, device, calls, 0
    def __call__(self, parameters, batch):
        found, self.called = self.likelihood(parameters, batch), self.called + 1
        if self.called not in self.calls:
            return found
        shards = []
        for shard in found.token_nll_BL.addressable_shards:
            values = np.array(shard.data)
            if shard.device.id == self.device:
                values.view(np.uint32)[-1, 3] ^= 1
            shards.append(jax.device_put(values, shard.device))
        array = found.token_nll_BL
        return found._replace(
            token_nll_BL=jax.make_array_from_single_device_arrays(array.shape, array.sharding, shards)
        )

for sizes in ((1, 8, 1, 1, 1), (2, 2, 2, 1, 1), (1, 2, 2, 2, 1), (1, 2, 2, 1, 2)):
    mesh = make_mesh(MeshConfig(*sizes))
    parameters = jax.device_put(initial_parameters(model, 0), parameter_shardings(model, mesh))
    likelihood = Likelihood(model, ComputeConfig("float32", "float32"), mesh, isolate_documents=False)
    require_twins(likelihood, parameters, rows, B, 7)
    for device in (0, 5):
        for calls, most in (({1, 2}, 1), ({1}, 2), ({2}, 2)):
            try:
                require_twins(Faulty(likelihood, device, calls), parameters, rows, B, 7)
            except ChipFault as error:
                ids = {int(number) for number in re.findall(r"cpu:(\\d+)", str(error))}
                assert device in ids and "step 7" in str(error), error
                assert len(ids) == most * (sizes[3] * sizes[4]), (sizes, device, calls, str(error))
                print(sizes, device, "named")
            else:
                sys.exit(f"{sizes}, device {device}, calls {calls}: not found")
"""


def test_a_device_that_flips_a_bit_is_named():
    """On every kind of mesh. In both readings: it is the one device (or those that share its rows). In one of them:
    it is one of two."""
    done = run_on_eight_devices(FLIPS)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("named") == 24
