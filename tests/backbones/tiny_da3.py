"""The real network of Depth Anything 3, tiny and with random weights, as `--backbone backbones.tiny_da3:backbone`."""

from __future__ import annotations

from torch import nn

from subspace3d.backbones.depth_anything_3 import DepthAnything3, import_package

DIM, DEPTH, FIRST_ACROSS = 32, 4, 2


class TinyDepthAnything3(DepthAnything3):
    image_size = 28

    def network(self) -> nn.Module:
        import_package()
        from depth_anything_3.model.cam_dec import CameraDec
        from depth_anything_3.model.cam_enc import CameraEnc
        from depth_anything_3.model.da3 import DepthAnything3Net
        from depth_anything_3.model.dinov2.dinov2 import DinoV2
        from depth_anything_3.model.dinov2.vision_transformer import DinoVisionTransformer
        from depth_anything_3.model.dualdpt import DualDPT

        starts = {"alt_start": FIRST_ACROSS, "qknorm_start": FIRST_ACROSS, "rope_start": FIRST_ACROSS}
        transformer = DinoVisionTransformer(
            img_size=28, patch_size=14, embed_dim=DIM, depth=DEPTH, num_heads=2, cat_token=True, **starts
        )
        # the published sizes alone have names, so the class's own __init__ is gone without
        backbone = DinoV2.__new__(DinoV2)
        nn.Module.__init__(backbone)
        backbone.pretrained, backbone.out_layers = transformer, [0, 1, 2, 3]
        head = DualDPT(2 * DIM, output_dim=2, features=16, out_channels=[8, 8, 16, 16])
        network = DepthAnything3Net(backbone, head, CameraDec(2 * DIM), CameraEnc(DIM, trunk_depth=1, num_heads=2))
        # a field of view that starts at zero stays there: its ReLU has no gradient
        nn.init.ones_(network.cam_dec.fc_fov[0].bias)
        return network


def backbone() -> DepthAnything3:
    return TinyDepthAnything3("tiny", DEPTH, FIRST_ACROSS)
