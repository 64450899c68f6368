"""What is not as VBench does it, and how much of a score that is: said with every result of its suites."""

from __future__ import annotations

ALWAYS = (
    {
        "what": "Networks compute in float32 on every device; VBench's CLIP computes in float16 where it runs on CUDA.",
        "metrics": ["background_consistency", "aesthetic_quality", "appearance_style"],
        "size": 1e-3,
    },
    {
        "what": "Videos are decoded by FFmpeg through PyAV; other decoders convert colours with other roundings.",
        "metrics": ["temporal_flickering", "motion_smoothness"],
        "size": 8e-5,
    },
)
LONG = (
    {
        "what": "Clips are ranges of frames; VBench-Long writes each clip as a new, lossy H.264 file and judges that.",
        "metrics": ["temporal_flickering"],
        "size": 5e-3,
    },
    {
        "what": "Clips are ranges of frames; VBench-Long writes each clip as a new, lossy H.264 file and judges that.",
        "metrics": ["imaging_quality"],
        "size": 8e-3,
    },
)


def list_differences(suite: str) -> list[dict[str, object]]:
    """Differences that stay in either mode: `what`, the `metrics` it touches, and up to which `size` of their score."""
    if not suite.startswith("vbench"):
        return []
    return [dict(entry) for entry in ALWAYS + (LONG if suite == "vbench-long" else ())]
