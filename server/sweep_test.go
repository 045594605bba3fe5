package server_test

import (
	"context"
	"testing"
	"time"

	"trainerd/server/servertest"
	"trainerd/storage"
)

// swept is a store in which killed processes leave parts of uploads.
type swept struct {
	storage.Blob
	age chan time.Duration
}

func (s swept) Sweep(_ context.Context, age time.Duration) (int, error) {
	s.age <- age
	return 1, nil
}

func TestPartsOfUploadsAreSweptAtAStart(t *testing.T) {
	age := make(chan time.Duration, 1)
	servertest.Start(t, servertest.Options{WrapStore: func(b storage.Blob) storage.Blob { return swept{b, age} }})
	select {
	case got := <-age:
		if got < time.Hour {
			t.Errorf("swept what is %v old: an upload under way may be as old", got)
		}
	case <-time.After(30 * time.Second):
		t.Fatal("nothing was swept")
	}
}
