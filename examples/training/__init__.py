"""Parts of ../train_prune_finetune.py: the images, the training loop, the tables."""
