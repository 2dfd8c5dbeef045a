"""Every family of the zoo: importing a family registers its models in timm."""

if not __name__.startswith("vizoo."):
    raise ImportError("this folder is the package vizoo.backbones; import it by that name")

from . import dependencyvit as dependencyvit
from . import flowformer as flowformer
from . import halonet as halonet
from . import litv2 as litv2
from . import medusa as medusa
from . import nat as nat
from . import ninformer as ninformer
from . import oat as oat
from . import overlock as overlock
from . import tcpa as tcpa
from . import transnext as transnext
from . import ulsam as ulsam
