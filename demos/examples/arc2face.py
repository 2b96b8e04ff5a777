"""Arc2Face: a person from the embedding alone, without a prompt."""

import sys

from facegen.pipelines import GeneratePipeline


def main(photos: list[str], model: str = "sd15", adapter: str = "arc2face", **loading: str) -> None:
    pipe = GeneratePipeline.from_pretrained(model, **loading)
    pipe.load_adapter(adapter)
    out = pipe(faces=photos, num_inference_steps=25, guidance_scale=3, scheduler="dpm++", seed=7)
    out.save(".", "arc2face")


if __name__ == "__main__":
    main(sys.argv[1:])
