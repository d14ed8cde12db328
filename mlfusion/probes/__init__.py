"""The probes, by the name of their head: a new one is one file that keeps `contract.Probe`, and one line here."""

from mlfusion.probes.attentive import Attentive
from mlfusion.probes.contract import Probe, Shape
from mlfusion.probes.linear import Linear
from mlfusion.specs import Head

PROBES: dict[Head, type[Probe]] = {
    "linear": Linear,
    "attentive": Attentive,
}

__all__ = ["PROBES", "Attentive", "Linear", "Probe", "Shape"]
