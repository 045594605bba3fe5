package document

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
)

// ErrNotObject says that a value is JSON, but no object.
var ErrNotObject = errors.New("not a JSON object")

// Member is one member of an object.
type Member struct {
	Name  string
	Value json.RawMessage
	Again bool // the object had a member of this name before
}

// Members lists the members of an object in their order. What is not one JSON
// value is a *json.SyntaxError with the offset; what is another value is ErrNotObject.
func Members(raw []byte) ([]Member, error) {
	var whole json.RawMessage
	if err := json.Unmarshal(raw, &whole); err != nil {
		return nil, err
	}
	d := json.NewDecoder(bytes.NewReader(raw))
	t, err := d.Token()
	if err != nil {
		return nil, fmt.Errorf("read document: %w", err)
	}
	if t != json.Delim('{') {
		return nil, ErrNotObject
	}
	var out []Member
	seen := map[string]bool{}
	for d.More() {
		t, err := d.Token()
		if err != nil {
			return nil, fmt.Errorf("read document: %w", err)
		}
		m := Member{Name: t.(string)}
		m.Again = seen[m.Name]
		seen[m.Name] = true
		if err := d.Decode(&m.Value); err != nil {
			return nil, fmt.Errorf("read %s: %w", m.Name, err)
		}
		out = append(out, m)
	}
	return out, nil
}
