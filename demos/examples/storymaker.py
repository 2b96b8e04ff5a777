"""StoryMaker: face, hair, clothes and body; give a photo with the person cut out (a transparent PNG)."""

import sys

from facegen.pipelines import GeneratePipeline


def main(photos: list[str], model: str = "sdxl", adapter: str = "storymaker", **loading: str) -> None:
    pipe = GeneratePipeline.from_pretrained(model, **loading)
    pipe.load_adapter(adapter)
    out = pipe(faces=photos, prompt="a person on a volcano", num_inference_steps=25, scheduler="unipc", seed=7)
    out.save(".", "storymaker")


if __name__ == "__main__":
    main(sys.argv[1:])
