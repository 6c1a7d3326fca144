"""Train a model.

finetuning, pretraining: the public calls
plan: what a run will be and cost on this machine, and the job that comes of it
models: what is trained, loaded or new
vocabulary: new tokenizers for new models
runs: a job from beginning to end
loop: the training loop; its docstring lists the events of a step in order
monitor: what is watched while a model trains
checkpoints: complete and verified, or not used; signals that stop a run
arguments: options as Trainer takes them
schedule: the arguments of the learning rate's scheduler
run_folder: who may write there, and what is left in the end
"""
