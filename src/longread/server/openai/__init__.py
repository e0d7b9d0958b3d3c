"""OpenAI's routes.

template.py       a chat as a text that a base model can continue
responses.py      /v1/responses; making.py makes one on the engine, objects.py what is sent of it
conversations.py  /v1/conversations
bodies.py         what the two take
history.py        responses, conversations and their items, kept on the disk
prefix.py         whether a prompt begins with what a session has read
"""
