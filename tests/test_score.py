"""The score of a pipeline in the shipped features."""

from dataclasses import replace

import pytest

from speed_diffusers.hub import load_pipeline
from speed_diffusers.metrics.score import score_pipeline


def test_the_shipped_checkpoint_scores_far_better_than_noise_and_says_how() -> None:
    pipeline = load_pipeline("embedded")
    score = score_pipeline(pipeline, num_images=100, num_inference_steps=10, batch_size=50)
    for parameter in pipeline.transformer.parameters():
        parameter.data.zero_()
    noise = score_pipeline(pipeline, num_images=100, num_inference_steps=10, batch_size=50)
    assert score.class_agreement > 0.6 > noise.class_agreement
    assert score.frechet_distance < 0.5 * noise.frechet_distance
    assert score.protocol == noise.protocol
    assert score.protocol.sampler == "DDIMScheduler" and len(score.protocol.reference_sha256) == 64
    assert score.to_dict()["protocol"]["num_images"] == 100


def test_the_same_noise_gives_the_same_score_whatever_the_batch() -> None:
    pipeline = load_pipeline("embedded")
    one, other = (
        score_pipeline(pipeline, num_images=20, num_inference_steps=2, batch_size=batch_size) for batch_size in (20, 7)
    )
    assert one.frechet_distance == pytest.approx(other.frechet_distance, rel=1e-3)
    assert replace(one, frechet_distance=0.0) == replace(other, frechet_distance=0.0)
