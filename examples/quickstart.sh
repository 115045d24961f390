#!/bin/sh
# The same calls with curl; needs a server on port 8000. The README shows it, a test runs it.
set -e

curl -X PUT http://127.0.0.1:8000/v1/sessions/pet -H 'Content-Type: application/json' -d '{"dim": 3}'
curl http://127.0.0.1:8000/v1/sessions/pet/memories -H 'Content-Type: application/json' \
    -d '{"embeddings": [[1, 0, 0], [0, 1, 0]], "payloads": [{"text": "cats purr"}, {"text": "dogs bark"}]}'
curl http://127.0.0.1:8000/v1/sessions/pet/search -H 'Content-Type: application/json' -d '{"queries": [0.1, 0.9, 0], "n": 1}'
curl http://127.0.0.1:8000/v1/sessions/pet/attend -H 'Content-Type: application/json' \
    -d '{"queries": [0.1, 0.9, 0], "return": ["output", "payloads"], "rank_by": "score"}'
