package trainer

import (
	"encoding/json"
	"testing"
)

func TestOldModelSpecs(t *testing.T) {
	for raw, want := range map[string]ModelSpec{
		`{"source":"dir:/m"}`:                           {Source: "dir:/m", State: "weights"},
		`{"source":"job:x@1","state":"training"}`:       {Source: "job:x@1", State: "training"},
		`{"source":"dir:/m","state":"weights","new":1}`: {Source: "dir:/m", State: "weights"},
	} {
		var got ModelSpec
		if err := json.Unmarshal([]byte(raw), &got); err != nil || got != want {
			t.Errorf("%s: %+v, %v", raw, got, err)
		}
	}
}
