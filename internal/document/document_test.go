package document

import (
	"encoding/json"
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestMembers(t *testing.T) {
	got, err := Members([]byte(` {"b": 1, "a":{"x":[1, 2]}, "b":null, "B":""} `))
	if err != nil {
		t.Fatal(err)
	}
	want := []Member{{"b", json.RawMessage("1"), false}, {"a", json.RawMessage(`{"x":[1, 2]}`), false}, {"b", json.RawMessage("null"), true}, {"B", json.RawMessage(`""`), false}}
	if d := cmp.Diff(want, got); d != "" {
		t.Error(d)
	}
	if got, err := Members([]byte("{}")); err != nil || len(got) != 0 {
		t.Errorf("%v, %v", got, err)
	}
	for _, raw := range []string{"", "{", `{"a":}`, `{"a":1} {}`, `{"a":1}x`, `{a:1}`, `[1,]`} {
		var syntax *json.SyntaxError
		if _, err := Members([]byte(raw)); !errors.As(err, &syntax) {
			t.Errorf("%q: %v, expected a syntax error", raw, err)
		}
	}
	for _, raw := range []string{"null", "[]", `"{}"`, "1"} {
		if _, err := Members([]byte(raw)); !errors.Is(err, ErrNotObject) {
			t.Errorf("%q: %v, expected ErrNotObject", raw, err)
		}
	}
}
