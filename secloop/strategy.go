package secloop

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
)

// Call is one tool call of a strategy.
type Call struct {
	Tool   string            `json:"tool"`
	Params map[string]string `json:"params"`
}

// Strategy is what a completion must be: a JSON list of tool calls.
type Strategy []Call

// MaxCalls bounds a strategy.
const MaxCalls = 8

// ParseStrategy accepts a completion that is exactly one JSON list of 1 to
// MaxCalls calls, each with "tool" and "params" and nothing else.
func ParseStrategy(text string) (Strategy, error) {
	dec := json.NewDecoder(bytes.NewReader([]byte(text)))
	dec.DisallowUnknownFields()
	var raw []struct {
		Tool   *string            `json:"tool"`
		Params *map[string]string `json:"params"`
	}
	if err := dec.Decode(&raw); err != nil {
		return nil, fmt.Errorf("parse strategy: %w", err)
	}
	if _, err := dec.Token(); err != io.EOF {
		return nil, fmt.Errorf("parse strategy: text after the list")
	}
	if len(raw) == 0 || len(raw) > MaxCalls {
		return nil, fmt.Errorf("parse strategy: %d calls, expected 1 to %d", len(raw), MaxCalls)
	}
	s := make(Strategy, len(raw))
	for i, c := range raw {
		if c.Tool == nil || c.Params == nil {
			return nil, fmt.Errorf("parse strategy: call %d: expected \"tool\" and \"params\"", i)
		}
		s[i] = Call{Tool: *c.Tool, Params: *c.Params}
	}
	return s, nil
}

// String renders the strategy as ParseStrategy accepts it, without white space.
func (s Strategy) String() string {
	var b bytes.Buffer
	enc := json.NewEncoder(&b)
	enc.SetEscapeHTML(false)
	_ = enc.Encode([]Call(s)) // strings always encode
	return string(bytes.TrimSpace(b.Bytes()))
}
