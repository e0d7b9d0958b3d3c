"""Pure tensor functions: the contract and the dispatch of each op, its readable reference, its fast twins.

Each op states the order of derivative that it supports. Order 0 is a value, order 1 a gradient, order 2 a
gradient of a gradient: what meta-training needs of everything that lies on the way of the inner gradient.
"""
