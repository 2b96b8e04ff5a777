"""ID-Animator: the face adapter, for a single picture."""

import sys

from facegen.pipelines import GeneratePipeline


def main(photos: list[str], model: str = "sd15", adapter: str = "id_animator", **loading: str) -> None:
    pipe = GeneratePipeline.from_pretrained(model, **loading)
    pipe.load_adapter(adapter)
    out = pipe(faces=photos, prompt="a person flying", num_inference_steps=30, guidance_scale=8, seed=7)
    out.save(".", "id_animator")


if __name__ == "__main__":
    main(sys.argv[1:])
