"""The numbers of the paper's tables: Jin et al., Training-free Diffusion Model Adaptation for Variable-Sized
Text-to-Image Synthesis, NeurIPS 2023.

"sd" is Stable Diffusion 2.1-base. The paper does not say whether its sizes are width x height; that is assumed here.
"""

from __future__ import annotations

# model family -> size -> (original, paper's scale); Tables 1 and 2
FID = {
    "sd": {
        (512, 512): (19.8168, 19.8168),
        (224, 224): (74.5742, 41.8925), (448, 448): (19.9039, 19.4923), (768, 768): (29.5974, 28.1372),
        (512, 288): (22.6249, 21.3877), (512, 384): (20.2315, 19.8631),
    },
    "ldm": {
        (256, 256): (20.4102, 20.4102),
        (128, 128): (65.2988, 57.5542), (224, 224): (23.0483, 22.7971), (384, 384): (20.5466, 20.3842),
        (256, 144): (33.8559, 33.0142), (256, 192): (24.2546, 23.9346),
    },
}  # fmt: skip
CLIP_SCORE = {
    "sd": {
        (512, 512): (0.3158, 0.3158),
        (224, 224): (0.2553, 0.2764), (448, 448): (0.3176, 0.3180), (768, 768): (0.3142, 0.3152),
        (512, 288): (0.3047, 0.3066), (512, 384): (0.3134, 0.3139),
    },
    "ldm": {
        (256, 256): (0.3153, 0.3153),
        (128, 128): (0.2679, 0.2747), (224, 224): (0.3094, 0.3096), (384, 384): (0.3148, 0.3156),
        (256, 144): (0.2884, 0.2890), (256, 192): (0.3070, 0.3075),
    },
}  # fmt: skip
QUALITY = {"fid": FID, "clip": CLIP_SCORE}
# Table 4, Stable Diffusion: size -> way -> (FID, MiB of GPU memory, seconds an image)
COST = {
    (128, 128): {"original": (191.5447, 6867, 3.4953), "paper": (127.2798, 6867, 3.4955),
                 "resized": (36.0742, 9324, 17.4377)},
    (224, 224): {"original": (74.5742, 7064, 5.6268), "paper": (41.8925, 7064, 5.6274),
                 "resized": (21.8415, 9324, 17.4457)},
}  # fmt: skip
# Table 5, Stable Diffusion, FID of 4000 samples: size -> way -> (FID, MiB of GPU memory, seconds an image)
MULTIDIFFUSION = {
    (224, 224): {"paper": (50.3515, 7064, 5.6274), "multidiffusion": (154.6925, 7061, 31.7680)},
    (768, 768): {"paper": (28.1372, 19797, 36.7140), "multidiffusion": (40.9270, 9906, 122.2485)},
}
