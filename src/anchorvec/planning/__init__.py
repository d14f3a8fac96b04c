"""What a run will take, told from the model's configuration: memory, disk, arithmetic and time, without its weights."""
