"""A real corpus in five languages and code, from packages that registries carry: fetched, cleaned, checked,
and split."""

from aurora_jax.sample_corpus.build import Manifest
from aurora_jax.sample_corpus.sample_command import SampleCommand, build_sample_corpus

__all__ = ["Manifest", "SampleCommand", "build_sample_corpus"]
