"""The pretrained networks of real_models.py. Others trained them; they ship in PyPI packages."""

from real_networks import images, science, sound, text
from real_networks.network import Network

NETWORKS: dict[str, Network] = {
    **images.NETWORKS,
    **sound.NETWORKS,
    **text.NETWORKS,
    **science.NETWORKS,
    **images.SMALL_NETWORKS,
}
