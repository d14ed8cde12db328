"""The heads, by name. A new head needs a file with a `contract.HeadModule` and a line here."""

from mlfusion.probing.heads.abmil import AbMIL
from mlfusion.probing.heads.aim import Aim
from mlfusion.probing.heads.attentive import Attentive
from mlfusion.probing.heads.contract import HeadModule, HeadShape
from mlfusion.probing.heads.efficient import Efficient
from mlfusion.probing.heads.linear import Linear
from mlfusion.probing.heads.scalar_mix import ScalarMix
from mlfusion.probing.heads.simpool import SimPool
from mlfusion.probing.heads.vjepa import VJepa, VJepa4
from mlfusion.specs.names import Head

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
