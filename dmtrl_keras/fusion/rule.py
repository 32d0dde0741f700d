"""What `multitask` and `single_task` do with fusion units."""

from dmtrl_keras.conversion.rules import Rule, register_rule
from dmtrl_keras.fusion.cross_stitch import CrossStitch
from dmtrl_keras.fusion.nddr import NDDR


class Fusion(Rule):
    """Layers through which tasks see each other's features."""

    has_weights = True
    sharing = "features"
    of_independent_tasks = False

    def problem(self, layer, shapes):
        return "it mixes the features of several tasks already"

    def single(self, layer, tasks, task):
        raise ValueError("it mixes the features of the tasks")


register_rule(CrossStitch, NDDR, rule=Fusion())
