"""What `loramix chat` is made of: the conversation, who answers, answers as they come, the commands."""
