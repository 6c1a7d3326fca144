"""Train a model.

finetuning, pretraining, preparation: the public calls
plan: what `auto` chooses and what a run will cost
runs: a run from begin to end
loop: the training loop
callbacks: checkpoints, held-out scores and the progress bar
checkpoints: complete and verified, or not used
arguments: options as Trainer takes them
run_folder: who may write there and what is left in the end
"""
