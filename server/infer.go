package server

import (
	"bytes"
	"net/http"
	"strconv"

	"github.com/labstack/echo/v4"

	"trainerd/rollout/arrowio"
	"trainerd/trainer"
)

// headerPolicyStep says which step's weights made an Arrow answer.
const headerPolicyStep = "Trainerd-Policy-Step"

type sampleRequest struct {
	Prompts     [][]int32 `json:"prompts"`
	N           *int      `json:"n"`
	MaxTokens   *int      `json:"max_tokens"`
	Temperature *float64  `json:"temperature"`
	TopP        *float64  `json:"top_p"`
	Seed        *uint64   `json:"seed"`
	Stop        []int32   `json:"stop"`
}

// defaultSampleTokens is max_tokens of a request that does not say.
const defaultSampleTokens = 64

func (s *Server) sample(c echo.Context) error {
	job, err := s.job(c)
	if err != nil {
		return err
	}
	var in sampleRequest
	if err := s.decodeJSON(c, &in); err != nil {
		return err
	}
	r := trainer.SampleRequest{Prompts: in.Prompts, N: 1, MaxTokens: defaultSampleTokens, Temperature: in.Temperature, TopP: 1, Seed: in.Seed, Stop: in.Stop}
	if in.N != nil {
		r.N = *in.N
	}
	if in.MaxTokens != nil {
		r.MaxTokens = *in.MaxTokens
	}
	if in.TopP != nil {
		r.TopP = *in.TopP
	}
	res, err := job.Sample(c.Request().Context(), r)
	if err != nil {
		return err
	}
	return c.JSON(http.StatusOK, res)
}

func (s *Server) logProbs(c echo.Context) error {
	job, err := s.job(c)
	if err != nil {
		return err
	}
	if err := wantArrow(c); err != nil {
		return err
	}
	if _, err := negotiate(c, arrowio.ContentType); err != nil {
		return err
	}
	body, err := s.readBody(c, s.jobs.Limits().MaxBatchBytes, nil)
	if err != nil {
		return err
	}
	rows, step, err := job.LogProbs(c.Request().Context(), body)
	if err != nil {
		return err
	}
	var out bytes.Buffer
	if err := arrowio.EncodeScores(&out, rows); err != nil {
		return err
	}
	c.Response().Header().Set(headerPolicyStep, strconv.FormatInt(step, 10))
	return c.Blob(http.StatusOK, arrowio.ContentType, out.Bytes())
}
