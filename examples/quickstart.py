"""Three notes remembered and one found; needs a server on port 8000. The README shows it, a test runs it."""

from htm_client import HTMClient

notes = ["the key is under the mat", "milk is in the fridge", "the meeting is on friday"]
words = sorted({word for note in notes for word in note.split()})


def embed(text: str) -> list[int]:  # stands for your embedding model
    return [text.split().count(word) for word in words]


with HTMClient("http://127.0.0.1:8000") as client:
    client.create_session("me", dim=len(words))
    client.append("me", [embed(note) for note in notes], payloads=[{"text": note} for note in notes])
    print(client.search("me", embed("where is my key"), n=1)[0].payload)  # {'text': 'the key is under the mat'}
    print(client.attend("me", embed("where is my key")).output)  # the attended vector, [1, D]
