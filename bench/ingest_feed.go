package bench

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"slices"
	"sync"
	"time"

	"trainerd/client"
	"trainerd/rollout"
	"trainerd/rollout/arrowio"
)

// FeedOptions say what the producers of Ingest send, and where.
type FeedOptions struct {
	URL        string `json:"url"`
	Job        string `json:"job"`
	Rows       int    `json:"rows"`
	BatchRows  int    `json:"batch_rows"`
	GroupSize  int    `json:"group_size"`
	Prompt     int    `json:"prompt"`
	Completion int    `json:"completion"`
	Producers  int    `json:"producers"`
	RowIDs     bool   `json:"row_ids"`
}

// FeedResult is what the producers saw.
type FeedResult struct {
	Rows    int       `json:"rows"`     // accepted
	Accept  []float64 `json:"accept_s"` // of each accepted body
	Refused int       `json:"refused_429"`
}

// bodyTemplate is an encoded batch. Batches differ by their number only, which
// is written over the marks: producing costs little beside accepting.
type bodyTemplate struct {
	bytes []byte
	marks []int
	batch *rollout.Batch // what it holds
}

// number makes the template the body of batch i.
func (t *bodyTemplate) number(i int) {
	text := fmt.Sprintf("%08d", i)
	for _, at := range t.marks {
		copy(t.bytes[at:], text)
	}
}

// template encodes a batch of groups whose rewards differ, from a fixed seed.
func (f FeedOptions) template() (bodyTemplate, error) {
	rng := rand.New(rand.NewPCG(3, 5))
	tokens := func(n int) []int32 {
		out := make([]int32, n)
		for i := range out {
			out[i] = int32(rng.IntN(ingestVocab))
		}
		return out
	}
	b := &rollout.Batch{HasReward: true}
	for g := range f.BatchRows / f.GroupSize {
		prompt := tokens(f.Prompt)
		for k := range f.GroupSize {
			row := rollout.Rollout{GroupID: fmt.Sprintf("%s-%d", loadMark, g), Prompt: prompt, Completion: tokens(f.Completion), Reward: float64(k), PolicyStep: 0}
			row.SamplerLogProbs = make([]float32, f.Completion)
			for i := range row.SamplerLogProbs {
				row.SamplerLogProbs[i] = -float32(rng.ExpFloat64())
			}
			if f.RowIDs {
				row.ID = fmt.Sprintf("%s-%d-%d", loadMark, g, k)
			}
			b.Rollouts = append(b.Rollouts, row)
		}
	}
	var buf bytes.Buffer
	if err := arrowio.Encode(&buf, b, ""); err != nil {
		return bodyTemplate{}, err
	}
	t := bodyTemplate{bytes: slices.Clip(slices.Clone(buf.Bytes())), batch: b} // as large as a received one
	for at := 0; ; {
		i := bytes.Index(t.bytes[at:], []byte(loadMark))
		if i < 0 {
			break
		}
		t.marks = append(t.marks, at+i)
		at += i + len(loadMark)
	}
	want := f.BatchRows
	if f.RowIDs {
		want *= 2
	}
	if len(t.marks) != want {
		return t, fmt.Errorf("encode a batch: found %d names, expected %d", len(t.marks), want)
	}
	return t, nil
}

// Feed sends batches until as many rows as wanted are accepted, each producer
// one after the other and each with an idempotency key. A body that is refused
// because the queue is full is sent again as late as the answer says.
func Feed(ctx context.Context, f FeedOptions) (FeedResult, error) {
	transport := http.DefaultTransport.(*http.Transport).Clone()
	transport.MaxIdleConnsPerHost = f.Producers
	transport.WriteBufferSize = 256 << 10
	defer transport.CloseIdleConnections()
	c, err := client.New(f.URL, client.Options{Retries: -1, HTTP: &http.Client{Transport: transport}})
	if err != nil {
		return FeedResult{}, err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	var mu sync.Mutex
	var r FeedResult
	var failed error
	next, batches := 0, f.Rows/f.BatchRows
	var producers sync.WaitGroup
	for range min(f.Producers, batches) {
		producers.Go(func() {
			body, err := f.template()
			for err == nil {
				mu.Lock()
				i := next
				next++
				mu.Unlock()
				if i >= batches {
					return
				}
				body.number(i)
				err = f.post(ctx, c, body.bytes, i, &mu, &r)
			}
			mu.Lock()
			defer mu.Unlock()
			if failed == nil {
				failed = err
			}
			cancel()
		})
	}
	producers.Wait()
	return r, failed
}

// post sends a batch until it is accepted.
func (f FeedOptions) post(ctx context.Context, c *client.Client, body []byte, i int, mu *sync.Mutex, r *FeedResult) error {
	for {
		began := time.Now()
		got, err := c.SubmitArrow(ctx, f.Job, body, fmt.Sprintf("ingest-%d", i))
		took := time.Since(began)
		var refusal *client.Error
		switch {
		case err == nil:
			mu.Lock()
			r.Rows += got.Rows
			r.Accept = append(r.Accept, took.Seconds())
			mu.Unlock()
			return nil
		case errors.As(err, &refusal) && refusal.Status == http.StatusTooManyRequests:
			mu.Lock()
			r.Refused++
			mu.Unlock()
		default:
			return fmt.Errorf("post batch %d: %w", i, err)
		}
		select {
		case <-time.After(refusal.RetryAfter):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}
