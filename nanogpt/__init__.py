"""What the scripts share. To follow a batch through train.py and model.py nobody needs to have read it."""
