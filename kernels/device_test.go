package kernels

import (
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestScatterTo(t *testing.T) {
	want := ScatterIndex{Dst: []int32{0, 2, 5}, Start: []int32{0, 1, 3, 6}, Src: []int32{3, 1, 4, 0, 2, 5}}
	if d := cmp.Diff(want, ScatterTo([]int32{5, 2, 5, 0, 2, 5})); d != "" {
		t.Errorf("expected -, got +\n%s", d)
	}
}
