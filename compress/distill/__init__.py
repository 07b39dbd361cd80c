"""Methods that train a student model to do what a teacher does."""
