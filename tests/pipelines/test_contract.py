"""What every file of pipelines/ keeps to."""

from __future__ import annotations

import pytest

from facegen import request as rq
from facegen.cli import commands
from facegen.errors import WrongRequest
from facegen.pipeline import Pipeline, task, tasks
from facegen.request import specs

# Fields that mean the same in every task; diffusers' names.
SHARED = {
    "prompt": "text",
    "negative_prompt": "text",
    "seed": "integer",
    "num_inference_steps": "integer",
    "guidance_scale": "number",
    "num_images_per_prompt": "integer",
    "strength": "strengths",
    "faces": "photos",
    "adapters": "names",
    "loras": "strengths",
}


def test_the_folder_is_the_list() -> None:
    assert "generate" in tasks()
    with pytest.raises(WrongRequest, match="perhaps you mean 'generate'"):
        task("generat")


@pytest.mark.parametrize("name", tasks())
def test_a_task_is_a_request_and_a_pipeline(name: str) -> None:
    kind = task(name)
    assert issubclass(kind, Pipeline)
    request = kind.request_class
    assert request.__name__ == f"{kind.__name__.removesuffix('Pipeline')}Request"
    assert request.task.endswith(".")
    assert name in commands()
    for field, spec in specs(request).items():
        assert spec.about.endswith("."), field
        assert spec.kind == SHARED.get(field, spec.kind), field


@pytest.mark.parametrize("name", tasks())
def test_defaults_are_valid_and_survive_json(name: str) -> None:
    request = task(name).request_class()
    assert rq.from_json(type(request), rq.to_json(request)) == request
    assert [control.name for control in rq.controls(type(request))] == list(specs(type(request)))


def test_pipelines_are_exported_by_name() -> None:
    from facegen.pipelines import GeneratePipeline, GenerateRequest

    assert task("generate") is GeneratePipeline
    assert GeneratePipeline.request_class is GenerateRequest

    import facegen.pipelines

    assert "GeneratePipeline" in dir(facegen.pipelines)
    with pytest.raises(AttributeError):
        facegen.pipelines.NoSuchPipeline  # noqa: B018
