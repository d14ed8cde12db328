"""The heads, by name: a new one is one file with a `contract.HeadModule`, and one line here."""

from mlfusion.probes.abmil import AbMIL
from mlfusion.probes.aim import Aim
from mlfusion.probes.attentive import Attentive
from mlfusion.probes.contract import HeadModule, HeadShape
from mlfusion.probes.efficient import Efficient
from mlfusion.probes.linear import Linear
from mlfusion.probes.scalar_mix import ScalarMix
from mlfusion.probes.simpool import SimPool
from mlfusion.probes.vjepa import VJepa, VJepa4
from mlfusion.specs import Head

HEADS: dict[Head, type[HeadModule]] = {
    "linear": Linear,
    "attentive": Attentive,
    "scalar-mix": ScalarMix,
    "efficient": Efficient,
    "abmil": AbMIL,
    "simpool": SimPool,
    "aim": Aim,
    "v-jepa": VJepa,
    "v-jepa-4": VJepa4,
}

__all__ = ["HEADS", "Attentive", "HeadModule", "HeadShape", "Linear"]
