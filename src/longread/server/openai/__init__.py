"""OpenAI's routes.

completions.py    /v1/completions and /v1/chat/completions
requests.py       what they take
prompts.py        what is read for a prompt, and a session that stays for others to go on from
responses.py      /v1/responses; making.py makes one on the engine, objects.py what is sent of it
conversations.py  /v1/conversations
bodies.py         what the two take
template.py       a chat as a text that a base model can continue
stored.py         responses as tenants have them: found, kept for a while, forgotten
history.py        responses, conversations and their items on the disk
prefix.py         whether a prompt begins with what a session has read
"""
