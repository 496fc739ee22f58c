"""The experiments by the name of their command: one that is entered here is a command, in sweeps and in `reproduce`."""

from . import classification, dynamics, forgetting, gaussian, generalisation, text

EXPERIMENTS = {
    module.EXPERIMENT.name: module.EXPERIMENT
    for module in (classification, gaussian, dynamics, generalisation, forgetting, text)
}
