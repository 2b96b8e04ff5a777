"""IP-Adapter: what a photo looks like, seen through CLIP."""

import sys

from facegen.pipelines import GeneratePipeline


def main(photos: list[str], model: str = "sd15", adapter: str = "ip_adapter", **loading: str) -> None:
    pipe = GeneratePipeline.from_pretrained(model, **loading)
    pipe.load_adapter(adapter)
    out = pipe(faces=photos, prompt="best quality", num_inference_steps=30, guidance_scale=7.5, seed=7)
    out.save(".", "ip_adapter")


if __name__ == "__main__":
    main(sys.argv[1:])
