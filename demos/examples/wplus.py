"""W+ adapter: a face's code in StyleGAN, as e4e saves it (.pth), made to smile."""

import sys
from pathlib import Path

from facegen.adapter import AdapterRequest, load_adapter
from facegen.checkpoints import content
from facegen.pipelines import GeneratePipeline


def main(codes: list[str], model: str = "sd15", adapter: str = "wplus", **loading: str) -> None:
    pipe = GeneratePipeline.from_pretrained(model, **loading)
    smiling, code = AdapterRequest(edits={"interfacegan/smile": 2.0}), content(Path(codes[0]))
    face = load_adapter(adapter, pipe.model).conditions_from_embeddings(code, pipe.model, smiling)
    pipe(prompt="a woman in a garden", conditions=face, num_inference_steps=30, seed=7).save(".", "wplus")


if __name__ == "__main__":
    main(sys.argv[1:])
