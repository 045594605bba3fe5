package access

import (
	"sync"
	"time"

	"trainerd/internal/fault"
)

// shares bounds how many requests are answered at once: of all together, and of
// one token, so that none can take every place.
type shares struct {
	most, each int // 0: no limit

	mu    sync.Mutex
	total int
	of    map[string]int // by token; no entry for none
}

func newShares(most, each int) *shares {
	return &shares{most: most, each: each, of: map[string]int{}}
}

// take takes a place. A refusal says which limit it is.
func (s *shares) take(token string) (why string, err error) {
	busy := func(why, text string) (string, error) {
		return why, &fault.Error{Kind: fault.Busy, Code: "too_many_requests", RetryAfter: time.Second, Msg: text}
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.most > 0 && s.total >= s.most:
		return busy("too many requests at once", "the server answers as many requests as it may at once")
	case s.each > 0 && token != "" && s.of[token] >= s.each:
		return busy("too many requests of the token at once", "the token has as many requests answered at once as it may")
	}
	s.total++
	if token != "" {
		s.of[token]++
	}
	return "", nil
}

// give gives a place back.
func (s *shares) give(token string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.total--
	if token == "" {
		return
	}
	if s.of[token]--; s.of[token] <= 0 {
		delete(s.of, token)
	}
}
