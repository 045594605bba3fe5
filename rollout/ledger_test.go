package rollout

import (
	"fmt"
	"runtime"
	"slices"
	"strings"
	"testing"
)

func TestLedgerRemembers(t *testing.T) {
	const n = 10*chunkSize + 7
	var l ledger[int]
	if _, ok := l.get(name("0")); ok {
		t.Fatal("an empty ledger knows a name")
	}
	var then records[int]
	for i := range n {
		if !l.add(name(fmt.Sprint(i)), i) {
			t.Fatalf("name %d is refused", i)
		}
		if i == n/2 {
			then = l.records
		}
	}
	for i := range n {
		if v, ok := l.get(name(fmt.Sprint(i))); !ok || v != i {
			t.Fatalf("name %d belongs to %d, %v", i, v, ok)
		}
		if l.add(name(fmt.Sprint(i)), -1) {
			t.Fatalf("name %d is entered twice", i)
		}
		if i <= n/2 && then.at(i).value != i {
			t.Fatalf("record %d of the list as it was is %d", i, then.at(i).value)
		}
	}
	long := strings.Repeat("x", 300)
	list := []string{"a", "", long, "b"}
	if got := slices.Collect(makeNames(list).all); !slices.Equal(got, list) || makeNames(list).len() != 4 {
		t.Fatalf("names %q", got)
	}
	if _, ok := l.get(name("none")); ok || l.records.n != n || then.n != n/2+1 {
		t.Fatalf("%d records, %d in the list as it was", l.records.n, then.n)
	}
}

// TestClosedGroupsAreSmall holds what a closed group costs for the life of a job:
// a record of 32 bytes, 5.3 to 10.7 bytes of index, its id in the list of its batch
// with a byte for its length, and a 32nd of a batch.
func TestClosedGroupsAreSmall(t *testing.T) {
	const batches, groups = 1500, 32
	heap := func() uint64 {
		var m runtime.MemStats
		runtime.GC()
		runtime.ReadMemStats(&m)
		return m.HeapAlloc
	}
	before := heap()
	a := NewAssembler(AssemblerOptions{GroupSize: 1, MaxPolicyLag: -1})
	for i := range batches {
		var rows []Rollout
		for k := range groups {
			rows = append(rows, row(fmt.Sprintf("batch-%06d-%02d", i, k), 1))
		}
		mustAdd(t, a, uint64(i+1), rows...)
		taken, _ := a.Take(groups, 0)
		if err := a.Mark(ids(taken), State{Status: Trained}); err != nil {
			t.Fatal(err)
		}
	}
	if each := float64(heap()-before) / (batches * groups); each > 80 {
		t.Errorf("a closed group takes %.0f bytes", each)
	} else {
		t.Logf("a closed group takes %.0f bytes", each)
	}
	runtime.KeepAlive(a)
}
