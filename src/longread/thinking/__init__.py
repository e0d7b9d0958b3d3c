"""Agents that think before they act: trials in a learned world model, then one in the world (after arXiv 2503.19815).

    world.py          the environment: boards, and what a marble does on them
    tasks.py          legal boards, withheld combinations, certified sets of boards
    trials.py         trials, played or tabulated
    world_model.py    the learned model of one sub-step
    agent.py          the agent; memory.py: its fast weights; recurrent.py: the ablation
    episode.py        acting at once, thinking, acting again; the loss
    selection.py      which boards are trained on
    cohort.py         many agents that train side by side
    train.py          a run: checkpoints, metrics, resume; thinker.py: the finished agent as a file
    evaluate.py       success under every control; report.py: of one agent, with reasons
    thought.py        one board, thought about and acted on; show.py: as people look at it

What is certain of the method and what is ours: docs/thinking.md.
"""

from longread.thinking.cohort import Cohort
from longread.thinking.config import ModelTraining, ThinkingConfig, WorldConfig
from longread.thinking.evaluate import FORMAT, Report, evaluate
from longread.thinking.show import as_svg, as_text, html_sections
from longread.thinking.tasks import CertifiedSet, certified_set
from longread.thinking.thinker import BOXED, Thinker, open_thinker, save_thinker
from longread.thinking.thought import ShownTrial, Thought, think
from longread.thinking.train import ThinkingTrainResult, train
from longread.thinking.world import MarbleWorld

__all__ = [
    "BOXED",
    "FORMAT",
    "CertifiedSet",
    "Cohort",
    "MarbleWorld",
    "ModelTraining",
    "Report",
    "ShownTrial",
    "Thinker",
    "ThinkingConfig",
    "ThinkingTrainResult",
    "Thought",
    "WorldConfig",
    "as_svg",
    "as_text",
    "certified_set",
    "evaluate",
    "html_sections",
    "open_thinker",
    "save_thinker",
    "think",
    "train",
]
